"""Pieces of tools/runner.py that a whole run does not show."""

import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tools.runner import SeedEpochs, WholeFileBackend, latest_checkpoint


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    backend, path = WholeFileBackend(), tmp_path / 'new/file.pth'
    backend.put(b'old', path)
    assert path.read_bytes() == b'old'
    monkeypatch.setattr(os, 'fsync', lambda _: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'):
        backend.put(b'new', path)
    assert path.read_bytes() == b'old'


def test_latest_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path / 'nowhere') is None
    assert latest_checkpoint(tmp_path) is None
    for time, name in enumerate(['epoch_2.pth', 'epoch_10.pth', 'best_epoch_1.pth']):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time, time))
    assert latest_checkpoint(tmp_path) == str(tmp_path / 'epoch_10.pth')
    note = tmp_path / 'last_checkpoint'
    for text, expected in (
        ('/moved/elsewhere/epoch_2.pth', 'epoch_2.pth'),
        ('', 'epoch_10.pth'),
        ('/run/epoch_3.pth', 'epoch_10.pth'),
    ):
        note.write_text(text)
        assert latest_checkpoint(tmp_path) == str(tmp_path / expected)


def test_an_epoch_draws_the_same_after_anything():
    def draw(**state):
        SeedEpochs().before_train_epoch(SimpleNamespace(**{'seed': 0, 'rank': 0, 'iter': 11, **state}))
        return random.random(), np.random.rand(), torch.rand(1).item()

    first = draw()
    assert draw() == first
    for other in ({'seed': 1}, {'rank': 1}, {'iter': 22}):
        assert not set(draw(**other)) & set(first)
