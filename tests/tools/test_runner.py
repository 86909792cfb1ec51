"""Pieces of tools/runner.py that a whole run does not show."""

import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tools.runner import Runner, SeedEpochs, WholeFileBackend, latest_checkpoint


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


class Draws(torch.utils.data.Dataset):
    """Each item is what the three random generators give."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return random.random(), np.random.rand(), torch.rand(1).item()


def test_workers_draw_anew_each_epoch_and_the_same_when_seeded_so():
    sampler = {'type': 'DefaultSampler', 'shuffle': False}
    loader = Runner.build_dataloader(
        {'dataset': Draws(), 'sampler': sampler, 'batch_size': 1, 'num_workers': 2, 'collate_fn': list}, seed=0
    )

    def epoch(done):
        SeedEpochs().before_train_epoch(SimpleNamespace(seed=0, rank=0, iter=done))
        return [value for batch in loader for item in batch for value in item]

    first, second = epoch(0), epoch(4)
    assert len({*first, *second}) == 24
    assert epoch(4) == second
