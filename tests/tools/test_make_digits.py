"""The data set of handwritten digits."""

import sys

import numpy as np
import pytest
from PIL import Image
from scripts import ROOT, call
from sklearn.datasets import load_digits

from tools import make_digits


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
    def fails(folder):
        (folder / 'half.png').touch()
        raise KeyboardInterrupt

    monkeypatch.setitem(make_digits.WRITERS, 'classification', fails)
    with pytest.raises(KeyboardInterrupt):
        make_digits.make(tmp_path / 'digits', 'classification')
    assert not list(tmp_path.iterdir())
