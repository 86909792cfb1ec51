"""Checkpoints are written whole, and a full disk leaves the older ones as they were."""

import os
import resource
import subprocess
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from test_finite import runner_of

from tools.cli import UserError
from tools.saving import WholeFileBackend, latest_checkpoint
from vision_rwkv.checkpoints import not_finite


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    backend, path = WholeFileBackend(), tmp_path / 'new/file.pth'
    backend.put(b'old', path)
    assert path.read_bytes() == b'old'
    monkeypatch.setattr(os, 'fsync', lambda _: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match=f'disk full: .{path}'):
        backend.put(b'new', path)
    assert path.read_bytes() == b'old'
    assert list(path.parent.iterdir()) == [path]


def test_latest_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path / 'nowhere') is None
    assert latest_checkpoint(tmp_path) is None
    for time, name in enumerate(['epoch_2.pth', 'epoch_10.pth', 'best_epoch_1.pth']):
        torch.save({}, tmp_path / name)
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


@pytest.mark.parametrize('noted', [True, False])
def test_a_checkpoint_that_is_cut_is_passed_over(noted, tmp_path):
    for time, name in enumerate(['epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth']):
        torch.save({'state_dict': {'a': torch.zeros(1000)}}, tmp_path / name)
        os.utime(tmp_path / name, (time, time))
    for name, size in (('epoch_2.pth', 0), ('epoch_3.pth', 3000)):
        os.truncate(tmp_path / name, size)
    if noted:
        (tmp_path / 'last_checkpoint').write_text(f'{tmp_path}/epoch_3.pth')
    assert latest_checkpoint(tmp_path) == str(tmp_path / 'epoch_1.pth')


def test_folders_as_deepspeed_writes_them(tmp_path):
    for time, name in enumerate(['epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth']):
        (tmp_path / name).mkdir()
        for part in ('mp_rank_00_model_states.pt', 'zero_pp_rank_0_mp_rank_00_optim_states.pt'):
            torch.save({'a': torch.zeros(1000)}, tmp_path / name / part)
        os.utime(tmp_path / name, (time, time))
    (tmp_path / 'last_checkpoint').write_text(f'{tmp_path}/epoch_3.pth')
    assert latest_checkpoint(tmp_path) == str(tmp_path / 'epoch_3.pth')
    os.truncate(tmp_path / 'epoch_3.pth/mp_rank_00_model_states.pt', 3000)
    assert latest_checkpoint(tmp_path) == str(tmp_path / 'epoch_2.pth')
    for part in (tmp_path / 'epoch_2.pth').iterdir():
        part.unlink()
    os.utime(tmp_path / 'epoch_2.pth', (5, 5))
    assert latest_checkpoint(tmp_path) == str(tmp_path / 'epoch_1.pth')


def test_a_checkpoint_gives_way_when_the_next_is_written(tmp_path, monkeypatch):
    """Even the only one that is kept, and the best one."""
    runner = runner_of(tmp_path, keep=1)
    there = []
    put = WholeFileBackend.put

    def watched_put(self, obj, filepath):
        there.append(sorted(path.name for path in tmp_path.glob('*.pth')))
        put(self, obj, filepath)

    monkeypatch.setattr(WholeFileBackend, 'put', watched_put)
    runner.train()
    assert there == [[], ['epoch_1.pth'], ['epoch_2.pth']]
    assert [path.name for path in tmp_path.glob('*.pth')] == ['epoch_3.pth']


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=400k', 'tmpfs', folder], capture_output=True).returncode:
        pytest.skip('may not mount a file system here')
    yield folder
    subprocess.run(['umount', '--lazy', folder], check=True)


def test_a_full_disk(small_disk, monkeypatch):
    runner = runner_of(small_disk)
    put = WholeFileBackend.put

    def put_on_full_disk(self, obj, filepath):
        if Path(filepath).name == 'epoch_3.pth':
            with open(small_disk / 'filler', 'wb', 0) as file, suppress(OSError):
                while file.write(bytes(4096)):
                    pass
        put(self, obj, filepath)

    monkeypatch.setattr(WholeFileBackend, 'put', put_on_full_disk)
    message = rf'cannot write {small_disk}/epoch_3\.pth: No space left on device; last whole .*/epoch_2\.pth$'
    with pytest.raises(UserError, match=message):
        runner.train()
    assert sorted(path.name for path in small_disk.glob('*epoch*')) == ['epoch_1.pth', 'epoch_2.pth']
    (small_disk / 'filler').unlink()
    for epoch in (1, 2):
        contents = torch.load(small_disk / f'epoch_{epoch}.pth', weights_only=False)
        assert contents['meta']['epoch'] == epoch and not not_finite(contents['state_dict'])


@pytest.mark.parametrize('kept', [1, 3])
def test_a_limit_on_files(kept, tmp_path, monkeypatch):
    """A real failure, amid a file: this process may write no more bytes to a file than half a checkpoint has."""
    runner = runner_of(tmp_path, keep=kept)
    put = WholeFileBackend.put
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited_put(self, obj, filepath):
        if Path(filepath).name == 'epoch_3.pth':
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(obj) // 2, hard))
        put(self, obj, filepath)

    monkeypatch.setattr(WholeFileBackend, 'put', limited_put)
    try:
        with pytest.raises(
            UserError, match=rf'cannot write {tmp_path}/epoch_3\.pth: File too large; last whole .*epoch_2'
        ):
            runner.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    names = {path.name for path in tmp_path.iterdir() if path.suffix in ('.pth', '.partial')}
    assert names == ({'epoch_2.pth'} if kept == 1 else {'epoch_1.pth', 'epoch_2.pth'})
    assert zipfile.is_zipfile(tmp_path / 'epoch_2.pth') and torch.load(tmp_path / 'epoch_2.pth', weights_only=False)
