"""Images are refused by name in every task."""

import re

import numpy as np
import pytest
from PIL import Image

from openmmlab import DataError, LoadImageFromFile


@pytest.fixture
def png(tmp_path):
    path = tmp_path / 'a.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)).save(path)
    return path


def test_a_whole_image(png):
    assert LoadImageFromFile().transform({'img_path': str(png)})['img'].shape == (40, 30, 3)


def test_what_cannot_be_loaded(png):
    for keep, message in (
        (2000, 'image file is truncated|Truncated'),
        (20, 'Truncated File Read|cut off in its header'),
        (0, 'the file is empty'),
    ):
        png.write_bytes(png.read_bytes()[:keep])
        with pytest.raises(DataError, match=rf'^image {png}: ({message})'):
            LoadImageFromFile().transform({'img_path': str(png)})
    png.unlink()
    with pytest.raises(DataError, match=f'^image {png}: there is no such file$'):
        LoadImageFromFile().transform({'img_path': str(png)})


def test_a_limit(png):
    assert LoadImageFromFile(max_pixels=1200).transform({'img_path': str(png)})
    with pytest.raises(
        DataError, match=re.escape(f'image {png}: 30 x 40 pixels, expected at most 1199 (max_pixels of')
    ):
        LoadImageFromFile(max_pixels=1199).transform({'img_path': str(png)})


@pytest.mark.parametrize('task', ['classification', 'detection', 'segmentation'])
def test_every_task_loads_so(task):
    toolbox = {'classification': 'mmpretrain', 'detection': 'mmdet', 'segmentation': 'mmseg'}[task]
    __import__(task)
    assert __import__(f'{toolbox}.registry').registry.TRANSFORMS.get('LoadImageFromFile') is LoadImageFromFile
