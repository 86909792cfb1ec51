"""The picture of predictions: what it shows, and that too low an accuracy is an error."""

import json
import pickle
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from tools import draw_predictions


def predictions_of(folder, right: int, wrong: int) -> list[dict]:
    """Predictions for images of class 1, as tools/test.py --out writes them."""
    Image.new('L', (8, 8), 100).save(folder / 'image.png')
    score = {True: torch.tensor([0.1, 0.9]), False: torch.tensor([0.7, 0.3])}
    return [
        {'img_path': str(folder / 'image.png'), 'gt_label': torch.tensor([1]), 'pred_score': score[i < right]}
        | {'pred_label': torch.tensor([int(i < right)])}
        for i in range(right + wrong)
    ]


@pytest.mark.parametrize(
    ('right', 'wrong', 'shown'), [(386, 4, (36, 4)), (10, 300, (10, 13)), (390, 0, (40, 0)), (3, 1, (3, 1))]
)
def test_what_is_shown(tmp_path, right, wrong, shown):
    chosen = draw_predictions.choose(predictions_of(tmp_path, right, wrong))
    assert (sum(map(draw_predictions.is_right, chosen)), len(chosen) - shown[0]) == shown


def test_colours_tell_right_from_wrong(tmp_path):
    figure = plt.figure()
    draw_predictions.draw_images(figure, predictions_of(tmp_path, 3, 2), ['cat', 'dog'])
    titles = [(axes.get_title(), axes.title.get_color()) for axes in figure.axes if axes.images]
    right, wrong = ('dog  90%', draw_predictions.GREEN), ('cat  70%  is dog', draw_predictions.RED)
    assert titles == [right] * 3 + [wrong] * 2
    plt.close(figure)


def test_logs_of_a_resumed_run(tmp_path):
    for name, entries in {
        '1': [{'loss': 2.0, 'step': 10}, {'accuracy/top1': 50.0, 'step': 1}, {'loss': 9.0, 'step': 20}],
        '2': [{'loss': 1.0, 'step': 20}, {'accuracy/top1': 80.0, 'step': 2}],
    }.items():
        log = tmp_path / name / 'vis_data/scalars.json'
        log.parent.mkdir(parents=True)
        log.write_text('\n'.join(map(json.dumps, entries)))
    assert draw_predictions.read_log(tmp_path) == ({10: 2.0, 20: 1.0}, {1: 50.0, 2: 80.0})


def test_accuracy_too_low_is_an_error_after_the_picture(tmp_path, monkeypatch, capsys):
    (tmp_path / 'predictions.pkl').write_bytes(pickle.dumps(predictions_of(tmp_path, 19, 1)))
    (tmp_path / 'classes.txt').write_text('cat\ndog\n')
    arguments = [
        tmp_path / 'predictions.pkl',
        tmp_path,
        tmp_path / 'out/picture.png',
        '--classes',
        tmp_path / 'classes.txt',
    ]
    monkeypatch.setattr(sys, 'argv', ['draw_predictions.py', *map(str, arguments), '--at-least', '95'])
    draw_predictions.main()
    assert 'top-1 95.00 % (19 of 20)' in capsys.readouterr().out
    assert np.asarray(Image.open(tmp_path / 'out/picture.png')).std() > 10
    monkeypatch.setattr(sys, 'argv', [*sys.argv[:-1], '95.1'])
    with pytest.raises(SystemExit, match='at least 95.1'):
        draw_predictions.main()
