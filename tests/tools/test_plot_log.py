"""Curves: what is read from logs, of resumed and of killed runs, and what is drawn."""

import json

import numpy as np
import pytest
import untrained
from PIL import Image

from tools import plot_log
from tools.cli import UserError
from tools.draw_predictions import read_log


def write(folder, *entries) -> None:
    log = folder / 'vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text('\n'.join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries))


def train(step: int, loss: float, **more) -> dict:
    return {'loss': loss, 'base_lr': 0.1 / step, 'iter': step, 'step': step, **more}


@pytest.fixture
def runs(tmp_path):
    """One run by epoch, resumed once and killed; one by iteration."""
    first = [train(10, 3.0, epoch=1), {'accuracy/top1': 50.0, 'step': 1}, train(20, 9.0, epoch=2)]
    second = [train(20, 2.0, epoch=2), {'accuracy/top1': 60.0, 'step': 2, 'note': 'text'}, '{"loss": 1.0, "base_']
    write(tmp_path / 'one/20260101_000000', *first)
    write(tmp_path / 'one/20260101_000100', *second)
    write(tmp_path / 'two/20260101_000000', train(10, 4.0), {'mIoU': 30.0, 'step': 10}, train(20, float('nan')))
    return tmp_path


def test_a_resumed_run_that_was_killed(runs):
    curves = plot_log.read_curves(runs / 'one')
    assert curves.training['loss'] == {10: 3.0, 20: 2.0} and curves.by_epoch
    assert curves.metrics == {'accuracy/top1': {1: 50.0, 2: 60.0}}
    single = plot_log.read_curves(runs / 'one/20260101_000000/vis_data/scalars.json')
    assert single.training['loss'] == {10: 3.0, 20: 9.0}
    assert plot_log.read_curves(runs / 'one/20260101_000000').training == single.training


def test_a_real_run(trained):
    curves = plot_log.read_curves(trained.work_dir)
    losses, accuracies = read_log(trained.work_dir)
    assert curves.training['loss'] == losses and curves.metrics['accuracy/top1'] == accuracies
    assert curves.by_epoch and plot_log.choose({'run': curves}, None) == ['loss', 'base_lr', 'accuracy/top1']


def test_what_is_drawn(runs):
    curves = {name: plot_log.read_curves(runs / name) for name in ('one', 'two')}
    names = plot_log.choose(curves, None)
    assert names == ['loss', 'base_lr', 'accuracy/top1', 'mIoU']
    figure = plot_log.draw(curves, names)
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}
    assert list(panels) == names
    lines = [line.get_xydata().tolist() for line in panels['loss'].lines]
    assert lines[0] == [[10, 3], [20, 2]] and lines[1][0] == [10, 4] and np.isnan(lines[1][1][1])
    labels = {name: axes.get_xlabel() for name, axes in panels.items()}
    assert labels == {'loss': 'iteration', 'base_lr': 'iteration', 'accuracy/top1': 'epoch', 'mIoU': 'iteration'}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['one', 'two']


def test_command(runs, monkeypatch, capsys):
    untrained.call(plot_log, monkeypatch, runs / 'one', '--out', runs / 'deep/curves.png', '--keys', 'loss')
    assert 'loss of 1 run(s)' in capsys.readouterr().out
    assert np.asarray(Image.open(runs / 'deep/curves.png')).std() > 10


def test_what_is_refused(runs, monkeypatch, capsys):
    write(runs / 'broken/20260101_000000', train(10, 1.0), 'text', train(20, 1.0))
    write(runs / 'other/20260101_000000', {'step': 1, 'iter': 1, 'fid': 3.0})
    out = ('--out', runs / 'x.png')
    for arguments, message in (
        ((runs / 'nowhere', *out), 'nowhere: neither a scalars.json nor the work dir'),
        ((runs / 'broken', *out), r"scalars\.json, line 2: expected what MMEngine logs, got 'text'"),
        (
            (runs / 'one', *out, '--keys', 'fid'),
            '--keys: fid was not logged; there are loss, base_lr, iter, epoch, acc',
        ),
        ((runs / 'other', *out), 'nothing to draw: none of loss, base_lr'),
    ):
        with pytest.raises(UserError, match=message):
            untrained.call(plot_log, monkeypatch, *arguments)
    assert not (runs / 'x.png').exists()
    with pytest.raises(SystemExit):
        untrained.call(plot_log, monkeypatch, runs / 'one', '--out', 'x.jpg')
    assert 'argument --out: expected a name that ends in .png, got x.jpg' in capsys.readouterr().err
