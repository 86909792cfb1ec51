"""The data sets of handwritten digits."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from scripts import ROOT, call
from sklearn.datasets import load_digits

from tools import make_digits, scenes


def test_every_digit_on_one_side_only():
    split = make_digits.split_digits()
    pictures = {side: {picture.tobytes() for *_, picture in digits} for side, digits in split.items()}
    assert not pictures['train'] & pictures['val']
    names = [name for digits in split.values() for name, *_ in digits]
    assert len(names) == len(set(names)) == 1797
    assert (len(split['train']), len(split['val'])) == (1407, 390)  # fixed for good: figures depend on it


def test_duplicates_stay_together(monkeypatch):
    data = load_digits()
    data.images = np.concatenate([data.images, data.images])
    data.target = np.concatenate([data.target, data.target])
    monkeypatch.setattr(make_digits, 'load_digits', lambda: data)
    split = make_digits.split_digits()
    pictures = {side: {picture.tobytes() for *_, picture in digits} for side, digits in split.items()}
    assert not pictures['train'] & pictures['val']
    assert (len(split['train']), len(split['val'])) == (2814, 780)


def test_files_are_the_digits(digits):
    data = load_digits()
    assert (digits / 'classes.txt').read_text().split() == list('0123456789')
    for side in ('train', 'val'):
        assert sorted(path.name for path in (digits / side).iterdir()) == list('0123456789')
    files = list(digits.glob('*/*/*.png'))
    assert len(files) == 1797
    for path in files[::40]:
        number = int(path.stem)
        picture = Image.open(path)
        assert (picture.size, picture.mode) == ((32, 32), 'L')
        assert data.target[number] == int(path.parent.name)
        small = np.asarray(picture.resize((8, 8), Image.Resampling.BOX), dtype=float)
        assert np.corrcoef(small.ravel(), data.images[number].ravel())[0, 1] > 0.95


def test_again_changes_nothing(digits):
    before = {path: path.stat().st_mtime_ns for path in digits.rglob('*')}
    said = call(sys.executable, ROOT / 'tools/make_digits.py', '--out', digits, cwd=digits.parent)
    assert 'already there' in said.stdout and '1407 training, 390 validation' in said.stdout
    assert {path: path.stat().st_mtime_ns for path in digits.rglob('*')} == before


def test_what_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / 'digits').mkdir()
    (tmp_path / 'digits/mine.txt').write_text('mine')
    said = call(sys.executable, ROOT / 'tools/make_digits.py', '--out', 'digits', cwd=tmp_path, expect=1)
    assert said.stderr.startswith('make_digits.py: error: digits exists') and len(said.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.rglob('*')] == ['digits', 'mine.txt']


def test_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def fails(folder, scenes):
        (folder / 'half.png').touch()
        raise KeyboardInterrupt

    monkeypatch.setitem(make_digits.WRITERS, 'classification', fails)
    with pytest.raises(KeyboardInterrupt):
        make_digits.make(tmp_path / 'digits', 'classification')
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Both data sets of scenes, as the script writes them."""
    folder = tmp_path_factory.mktemp('scenes')
    for kind in ('detection', 'segmentation'):
        options = ('--kind', kind, '--out', folder / kind, '--scenes', 16)
        said = call(sys.executable, ROOT / 'tools/make_digits.py', *options, cwd=folder)
        assert '16 training, 2 validation images' in said.stdout
    return folder


def test_no_photograph_on_both_sides():
    assert not set(scenes.PHOTOS['train']) & set(scenes.PHOTOS['val'])
    pixels = {side: {photo.tobytes() for photo in scenes.photos(side)} for side in ('train', 'val')}
    assert len(pixels['train']) == 9 and len(pixels['val']) == 5 and not pixels['train'] & pixels['val']


def test_scenes_take_digits_and_photographs_of_their_side(monkeypatch):
    split, taken = make_digits.split_digits(), {}

    def record(side, count, pictures):
        taken[side] = (count, [picture.tobytes() for _, picture in pictures])
        return []

    monkeypatch.setattr(scenes, 'scenes', record)
    assert list(make_digits.make_scenes(60)) == []
    for side, count in (('train', 60), ('val', 7)):
        assert taken[side] == (count, [picture.tobytes() for *_, picture in split[side]])


def test_scenes_are_always_the_same_and_all_different():
    pictures = [(label, picture) for _, label, picture in make_digits.split_digits()['val']]
    first, again = (list(scenes.scenes('val', 3, pictures)) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.picture, b.picture)
        assert [(d.label, d.box) for d in a.digits] == [(d.label, d.box) for d in b.digits]
    assert len({scene.picture.tobytes() for scene in first}) == 3


def test_digits_stand_out_and_do_not_overlap():
    pictures = [(label, picture) for _, label, picture in make_digits.split_digits()['train']]
    for scene in scenes.scenes('train', 10, pictures):
        assert 1 <= len(scene.digits) <= 7 and scene.picture.shape == (160, 160, 3)
        assert max(sum(digit.mask.astype(int) for digit in scene.digits).ravel()) == 1
        grey = scene.picture @ np.array([0.299, 0.587, 0.114])
        for digit in scene.digits:
            left, top, width, height = digit.box
            rows, columns = np.nonzero(digit.mask)
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
            assert 28 <= height <= 72
            ink = grey[digit.mask]
            assert np.median(np.abs(ink - np.median(ink))) < 8  # one colour, some noise
            around = grey[max(0, top - 3) : top + height + 3, max(0, left - 3) : left + width + 3]
            assert np.median(ink) > np.percentile(around, 25) + 30


def test_annotations_are_cocos(made):
    for side, count in (('train', 16), ('val', 2)):
        contents = json.loads((made / f'detection/annotations/instances_{side}.json').read_text())
        assert [category['name'] for category in contents['categories']] == list('0123456789')
        assert len(contents['images']) == count
        for image in contents['images']:
            picture = Image.open(made / 'detection/images' / side / image['file_name'])
            assert picture.size == (image['width'], image['height']) == (160, 160)
        for annotation in contents['annotations']:
            left, top, width, height = annotation['bbox']
            mask = coco_mask.decode(annotation['segmentation'])
            rows, columns = np.nonzero(mask)
            assert annotation['area'] == mask.sum() and mask.shape == (160, 160)
            assert (left, top, left + width, top + height) == (
                *(columns.min(), rows.min()),
                *(columns.max() + 1, rows.max() + 1),
            )
        ids = [annotation['id'] for annotation in contents['annotations']]
        assert len(ids) == len(set(ids)) >= 3 * count


def test_masks_show_the_same_scenes_in_ade20ks_layout(made):
    assert (made / 'segmentation/classes.txt').read_text().split() == ['background', *'0123456789']
    for side, split in (('train', 'training'), ('val', 'validation')):
        contents = json.loads((made / f'detection/annotations/instances_{side}.json').read_text())
        for image in contents['images']:
            expected = np.ones((160, 160), np.uint8)
            for annotation in contents['annotations']:
                if annotation['image_id'] == image['id']:
                    expected[coco_mask.decode(annotation['segmentation']) > 0] = annotation['category_id'] + 1
            path = made / 'segmentation/annotations' / split / image['file_name'].replace('.jpg', '.png')
            assert np.array_equal(np.asarray(Image.open(path)), expected)
            pictures = [
                folder / image['file_name']
                for folder in (made / 'detection/images' / side, path.parents[2] / 'images' / split)
            ]
            assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_another_kind_is_left_alone(made):
    options = ('--kind', 'segmentation', '--out', made / 'detection')
    said = call(sys.executable, ROOT / 'tools/make_digits.py', *options, cwd=made, expect=1)
    assert 'is no segmentation data set of this tool' in said.stderr
    said = call(sys.executable, ROOT / 'tools/make_digits.py', '--scenes', 0, cwd=made, expect=1)
    assert 'at least one scene, got 0' in said.stderr
