"""Annotations, images and masks that are not what they should be: errors that name the file."""

import json
import re
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from dense_configs import DIGITS, ROOT, load
from mmcv.transforms import Compose
from mmdet.registry import DATASETS as DETECTION
from mmseg.registry import DATASETS as SEGMENTATION
from PIL import Image

from tools import make_digits


@pytest.fixture(scope='module')
def made(tmp_path_factory) -> Path:
    """Both data sets of scenes, six to train on and one for validation."""
    folder = tmp_path_factory.mktemp('made')
    for kind in ('detection', 'segmentation'):
        make_digits.make(folder / f'digits_{kind}', kind, scenes=6)
    return folder


@pytest.fixture
def data(made, tmp_path) -> Path:
    """A copy to spoil."""
    shutil.copytree(made, tmp_path / 'data')
    return tmp_path / 'data'


def dataset(name: str, data: Path, **changes):
    """The training set of a small config, in ``data``."""
    cfg = load(name).cfg.train_dataloader.dataset
    registry = DETECTION if name == DIGITS[0] else SEGMENTATION
    return registry.build({**cfg, 'data_root': str(data / Path(cfg.data_root).name), **changes})


def cut(path: Path, keep: float) -> None:
    """Truncate a file."""
    contents = path.read_bytes()
    path.write_bytes(contents[: int(len(contents) * keep)])


def first_error(built) -> str:
    """The message of the ValueError that reading the data set ends in."""
    with pytest.raises(ValueError) as error:  # noqa: PT011
        for index in range(len(built)):
            built[index]
    return str(error.value)


def test_whole_data_sets_are_read(data):
    for name in DIGITS:
        built = dataset(name, data)
        assert len(built) == 6 and all(built[i]['inputs'].shape[0] == 3 for i in range(6))


@pytest.mark.parametrize(
    ('contents', 'message'),
    [
        ('{"images": [', 'not in COCO format: Expecting value'),
        ('[1, 2]', "not in COCO format: annotation file format <class 'list'> not supported"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', 'found 0 of these 10|no '),
        ('{}', 'found 0 of these 10|not in COCO format'),
    ],
)
def test_annotation_file(contents, message, data):
    path = data / 'digits_detection/annotations/instances_train.json'
    path.write_text(contents)
    with pytest.raises(ValueError, match=message) as error:
        dataset(DIGITS[0], data)
    assert str(error.value).startswith(f'annotation file {path}: ')


LARGE = 'reaches further out of its image of 160 x 160 than that is large'


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('bbox', [10, 10, -5, 8], r'box \[10, 10, -5, 8\]: its width or height is negative'),
        ('bbox', [10, 10, 5, -8], 'its width or height is negative'),
        ('bbox', [-20, 10, 5, 8], r'box \[-20, 10, 5, 8\]: it lies outside its image of 160 x 160'),
        ('bbox', [10, 161, 5, 8], 'it lies outside its image of 160 x 160'),
        ('bbox', [float('nan'), 10, 5, 8], r'box \[nan, 10, 5, 8\]: expected 4 finite numbers'),
        ('bbox', [10, 10, float('inf'), 8], 'expected 4 finite numbers'),
        ('bbox', [10, 10, 1e30, 8], LARGE),
        ('bbox', [10, 10, 5], 'expected 4 finite numbers'),
        ('bbox', ['10', '10', '5', '8'], 'not in COCO format'),
        ('bbox', None, 'not in COCO format'),
        ('segmentation', [[1, 1, 9, float('nan'), 9, 9]], 'segmentation: expected finite numbers'),
        ('segmentation', [[1, 1, 9, 1, 9, 9], [1, 1, 1e9, 1, 9, 9]], LARGE),
        ('segmentation', {'size': [10**6, 10**6], 'counts': '0'}, r'\[1000000, 1000000\] in an image of \[160, 160\]'),
        ('segmentation', {'size': [160, 160], 'counts': [0, 10**9]}, 'segmentation: Invalid RLE mask'),
        ('segmentation', {'size': [160, 160], 'counts': 'o' * 99}, 'segmentation: Invalid RLE mask'),
        ('segmentation', {'size': [160, 160]}, "no 'counts'"),
    ],
)
def test_boxes_and_masks_that_cannot_be(field, value, message, data):
    path = data / 'digits_detection/annotations/instances_train.json'
    contents = json.loads(path.read_text())
    annotation = contents['annotations'][3]
    annotation[field] = value
    path.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=message) as error:
        dataset(DIGITS[0], data)
    assert str(error.value).startswith(f'annotation file {path}: not in COCO format: ')
    if 'its' in message:
        assert f'annotation {annotation["id"]} of image {annotation["image_id"]:04d}.jpg: ' in str(error.value)


def test_boxes_over_the_edge_and_empty_ones(data):
    """COCO's own files have both."""
    path = data / 'digits_detection/annotations/instances_train.json'
    contents = json.loads(path.read_text())
    contents['annotations'][0]['bbox'] = [-3.5, 150, 20, 20]
    contents['annotations'][1] |= {'bbox': [20, 20, 8, 0.0], 'segmentation': [[20, 20, 28, 20, 28, 20.5]]}
    path.write_text(json.dumps(contents))
    assert len(dataset(DIGITS[0], data)) == 6


def huge(path: Path, width: int, height: int) -> None:
    """A PNG file of a few kilobytes whose header promises so many pixels."""

    def chunk(kind: bytes, contents: bytes) -> bytes:
        return struct.pack('>I', len(contents)) + kind + contents + struct.pack('>I', zlib.crc32(kind + contents))

    header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0))
    path.write_bytes(
        b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(bytes(1 << 20))) + chunk(b'IEND', b'')
    )


@pytest.mark.parametrize('name', DIGITS)
@pytest.mark.parametrize(
    ('size', 'message'),
    [
        (
            (10_000, 10_000),
            r'10000 x 10000 pixels, expected at most 89478485 \(max_pixels of the transform that loads it\)',
        ),
        ((100_000, 100_000), 'Image size .10000000000 pixels. exceeds limit of'),
    ],
)
def test_an_image_of_too_many_pixels(name, size, message, data):
    (path,) = data.glob(f'{Path(load(name).cfg.data_root).name}/images/train*/0003.jpg')
    huge(path, *size)
    assert re.match(f'image {path}: {message}', first_error(dataset(name, data)))


def test_a_limit_of_ones_own(data):
    pipeline = [{'type': 'LoadImageFromFile', 'max_pixels': 160 * 160 - 1}, {'type': 'PackDetInputs'}]
    said = first_error(dataset(DIGITS[0], data, pipeline=pipeline))
    assert '160 x 160 pixels, expected at most 25599 ' in said
    pipeline[0]['max_pixels'] += 1
    assert dataset(DIGITS[0], data, pipeline=pipeline)[5]['inputs'].shape == (3, 160, 160)
    mask = [{'type': 'LoadImageFromFile'}, {'type': 'LoadAnnotations', 'max_pixels': 99}, {'type': 'PackSegInputs'}]
    assert re.match('image .*png: 160 x 160 pixels', first_error(dataset(DIGITS[1], data, pipeline=mask)))


def test_missing_annotation_file(data):
    path = data / 'digits_detection/annotations/instances_train.json'
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f'annotation file not found: {path}'):
        dataset(DIGITS[0], data)


def test_classes_that_the_annotations_lack(data):
    with pytest.raises(ValueError, match=r'instances_train\.json: expected the classes 0, cat, found 1 of these 2'):
        dataset(DIGITS[0], data, metainfo={'classes': ('0', 'cat')})


@pytest.mark.parametrize('name', DIGITS)
@pytest.mark.parametrize('keep', [0, 0.01, 0.5, 0.95])
def test_truncated_image(name, keep, data):
    (path,) = data.glob(f'{Path(load(name).cfg.data_root).name}/images/train*/0003.jpg')
    cut(path, keep)
    assert first_error(dataset(name, data)).startswith(f'image {path}: ')


@pytest.mark.parametrize('name', DIGITS)
def test_image_that_is_none(name, data):
    (path,) = data.glob(f'{Path(load(name).cfg.data_root).name}/images/train*/0003.jpg')
    path.write_text('words, not pixels')
    assert first_error(dataset(name, data)) == f'image {path}: not an image'


def test_jpeg_with_a_tail_is_whole(data):
    for path in data.glob('digits_detection/images/train/*.jpg'):
        with open(path, 'ab') as file:
            file.write(b'some camera wrote this')
    assert dataset(DIGITS[0], data)[0]['inputs'].shape[0] == 3


def test_truncated_mask(data):
    path = data / 'digits_segmentation/annotations/training/0003.png'
    cut(path, 0.5)
    assert first_error(dataset(DIGITS[1], data)).startswith(f'image {path}: ')
    path.write_text('words')
    assert first_error(dataset(DIGITS[1], data)) == f'mask {path}: not an image'


@pytest.mark.parametrize(
    ('index', 'wrong'), [(12, True), (200, True), (254, True), (11, False), (255, False), (0, False)]
)
def test_index_that_is_no_class(index, wrong, data):
    path = data / 'digits_segmentation/annotations/training/0003.png'
    mask = np.array(Image.open(path))
    mask[5, 7] = index
    Image.fromarray(mask).save(path)
    built = dataset(DIGITS[1], data)
    if wrong:
        expected = f'mask {path}: index {index} is no class; expected 1 to 11, or 0 or 255 to ignore a pixel'
        assert first_error(built) == expected
    else:
        assert [built[i]['inputs'].shape[0] for i in range(6)] == [3] * 6


def test_index_that_is_no_class_where_zero_is_one(data):
    cfg = load(DIGITS[1]).cfg.train_dataloader.dataset
    pipeline = [{'type': 'LoadImageFromFile'}, {'type': 'LoadAnnotations'}, {'type': 'PackSegInputs'}]
    changes = {'reduce_zero_label': False, 'pipeline': pipeline, 'metainfo': {'classes': tuple('abcdefghijk')}}
    built = SEGMENTATION.build({**cfg, 'data_root': str(data / 'digits_segmentation'), **changes})
    assert first_error(built).endswith('index 11 is no class; expected 0 to 10, or 255 to ignore a pixel')


def test_colour_mask(data):
    path = data / 'digits_segmentation/annotations/training/0003.png'
    Image.open(path).convert('RGB').save(path)
    assert first_error(dataset(DIGITS[1], data)) == (
        f'mask {path}: expected one class index for each pixel, got an array (160, 160, 3)'
    )


def test_no_images(data):
    shutil.rmtree(data / 'digits_segmentation/images/training')
    (data / 'digits_segmentation/images/training').mkdir()
    with pytest.raises(FileNotFoundError, match=r'no \*\.jpg in .*/images/training'):
        dataset(DIGITS[1], data)


def test_published_data_sets_are_checked_too():
    for name, registry in (
        ('CocoDataset', DETECTION),
        ('ADE20KDataset', SEGMENTATION),
        ('BaseSegDataset', SEGMENTATION),
    ):
        assert registry.get(name).__module__.split('.')[0] in ('detection', 'segmentation')


def test_unchecked_data_sets_still_load(data):
    """A data set of MMSegmentation's that tells no number of classes."""
    load(DIGITS[1])
    paths = {
        'img_path': str(data / 'digits_segmentation/images/training/0000.jpg'),
        'seg_map_path': str(data / 'digits_segmentation/annotations/training/0000.png'),
    }
    info = {**paths, 'reduce_zero_label': False, 'label_map': None, 'seg_fields': []}
    out = Compose([{'type': 'LoadImageFromFile'}, {'type': 'LoadAnnotations'}])(info)
    assert out['gt_seg_map'].max() >= 2


def test_scripts_end_at_once_and_name_the_file(data, tmp_path):
    sys.path.insert(0, str(ROOT / 'tests/tools'))
    from scripts import call, errors_in

    def train(name: str, expect: int, *options: str) -> str:
        script = [
            ROOT / 'tools/dist_train.sh',
            ROOT / f'configs/{name}.py',
            2,
            '--work-dir',
            tmp_path / 'work',
            *options,
        ]
        return call(*script, cwd=tmp_path, expect=expect, OMP_NUM_THREADS=1).stderr

    annotations = data / 'digits_detection/annotations/instances_train.json'
    whole = json.loads(annotations.read_text())
    annotations.write_text(json.dumps(whole)[:1000])
    (line,) = errors_in(train(DIGITS[0], 2))
    assert line.startswith(
        'train.py: error: data: annotation file data/digits_detection/annotations/instances_train.json'
    )
    mask = data / 'digits_segmentation/annotations/training/0002.png'
    Image.fromarray(np.full((160, 160), 77, np.uint8)).save(mask)
    said = train(DIGITS[1], 2, '--cfg-options', 'train_dataloader.num_workers=2')
    assert re.search(r'iteration \d: mask .*/0002\.png: index 77 is no class', said)
