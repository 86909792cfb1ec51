"""The picture of boxes, masks and labels, and that too low a figure is an error."""

import json
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from tools import draw_scenes

CLASSES = ['background', 'cat', 'dog']


@pytest.fixture
def tested(tmp_path):
    """An image, and the log of a test."""
    Image.new('RGB', (40, 30), (50, 50, 50)).save(tmp_path / 'image.png')
    (tmp_path / 'test/20260101_000000').mkdir(parents=True)
    log = tmp_path / 'test/20260101_000000/20260101_000000.json'
    log.write_text(json.dumps({'mIoU': 71.5, 'coco/bbox_mAP_50': 0.66}))
    (tmp_path / 'classes.txt').write_text('\n'.join(CLASSES))
    return tmp_path


def square() -> np.ndarray:
    mask = np.zeros((30, 40), np.uint8, order='F')
    mask[5:20, 10:30] = 1
    return mask


def instances(path) -> dict:
    """A sure and an unsure detection, as DumpDetResults writes them."""
    found = {
        'bboxes': torch.tensor([[10.0, 5, 30, 20], [0, 0, 5, 5]]),
        'labels': torch.tensor([2, 1]),
        'scores': torch.tensor([0.9, 0.2]),
        'masks': [coco_mask.encode(square())] * 2,
    }
    return {'img_path': str(path), 'pred_instances': found}


def texts(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_detections(tested):
    figure = draw_scenes.draw([instances(tested / 'image.png')], CLASSES, 'title')
    assert texts(figure) == ['dog 90%']
    axes = figure.axes[0]
    (box,) = axes.patches
    assert (box.get_xy(), box.get_width(), box.get_height()) == ((10, 5), 20, 15)
    picture, overlay = (image.get_array() for image in axes.images)
    assert picture.shape == (30, 40, 3)
    assert np.array_equal(overlay[..., 3] > 0, square() > 0)


def test_pixels(tested):
    labels = np.zeros((30, 40), np.uint16)
    labels[2:12, 3:13] = 1
    labels[20, 20] = 1  # a speck
    labels[15:29, 25:39] = 2
    figure = draw_scenes.draw([{'img_path': str(tested / 'image.png'), 'pred_sem_seg': labels}], CLASSES, 'title')
    assert texts(figure) == ['cat', 'dog']
    overlays = [image.get_array()[..., 3] > 0 for image in figure.axes[0].images[1:]]
    assert [np.array_equal(overlay, labels == i) for i, overlay in enumerate(overlays, 1)] == [True, True]


@pytest.mark.parametrize(('bar', 'fails'), [('coco/bbox_mAP_50=0.6', False), ('coco/bbox_mAP_50=0.67', True)])
def test_bars(tested, bar, fails, monkeypatch, capsys):
    (tested / 'predictions.pkl').write_bytes(pickle.dumps([instances(tested / 'image.png')]))
    paths = [tested / name for name in ('predictions.pkl', 'test', 'out/picture.png')]
    options = ['--classes', tested / 'classes.txt', '--at-least', 'mIoU=70', bar]
    monkeypatch.setattr(sys, 'argv', ['draw_scenes.py', *map(str, [*paths, *options])])
    if fails:
        with pytest.raises(SystemExit, match=r'expected coco/bbox_mAP_50 at least 0\.67'):
            draw_scenes.main()
    else:
        draw_scenes.main()
    assert '1 images; mIoU 71.500, coco/bbox_mAP_50 0.660; picture: ' in capsys.readouterr().out
    assert Image.open(tested / 'out/picture.png').size[0] > 1000


def test_no_log(tmp_path):
    with pytest.raises(SystemExit, match='no test was logged in'):
        draw_scenes.read_metrics(tmp_path)
