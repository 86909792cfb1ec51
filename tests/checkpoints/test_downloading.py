"""Downloads over connections that break: whole, or not at all."""

import hashlib
import random
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from server import Files, serve

from vision_rwkv.checkpoints import CheckpointError, download, read

CONTENTS = random.Random(0).randbytes(300_000)


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """torch.hub's cache in a folder of its own, and no waiting."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    monkeypatch.setattr('vision_rwkv.checkpoints.downloading.PAUSE', 0)
    return tmp_path / 'checkpoints'


def test_a_file_goes_to_the_cache_once(hub, capsys):
    files = Files(CONTENTS)
    with serve(files) as address:
        for _ in range(2):
            assert download(f'{address}/some/a.pth?download=true') == hub / 'a.pth'
    assert (hub / 'a.pth').read_bytes() == CONTENTS
    assert [path.name for path in hub.iterdir()] == ['a.pth'] and files.asked == [0]
    assert 'a.pth: 100%' in capsys.readouterr().err


@pytest.mark.parametrize('offered', [{}, {'etag': None}, {'ranges': False}])
def test_a_broken_connection_is_taken_up(hub, offered):
    files = Files(CONTENTS, breaks=[100_000, 0, 70_000], **offered)
    with serve(files) as address:
        download(f'{address}/a.pth')
    assert (hub / 'a.pth').read_bytes() == CONTENTS
    assert files.asked == ([0, 0, 0, 0] if offered else [0, 100_000, 100_000, 170_000])


def test_a_file_that_changes_meanwhile(hub):
    files = Files(b'x' * 200_000, breaks=[100_000], then=(CONTENTS, '"two"'))
    with serve(files) as address:
        download(f'{address}/a.pth')
    assert (hub / 'a.pth').read_bytes() == CONTENTS


def test_giving_up(hub):
    files = Files(CONTENTS, breaks=[100_000, *[0] * 9])
    with serve(files) as address, pytest.raises(CheckpointError, match=r'a\.pth: download given up after 100000 bytes'):
        download(f'{address}/a.pth')
    assert not (hub / 'a.pth').exists() and len(files.asked) == 6
    with serve(Files(CONTENTS)) as address:  # and another try starts over
        download(f'{address}/a.pth')
    assert (hub / 'a.pth').read_bytes() == CONTENTS


@pytest.mark.parametrize(
    ('offered', 'message', 'requests'),
    [
        ({'status': 404}, 'the server says 404 Not Found', 1),
        ({'status': 503}, '5 attempts: the server says 503', 5),
        ({'length': False}, 'does not say how long the file is', 1),
    ],
)
def test_servers_without_the_file(hub, offered, message, requests):
    files = Files(CONTENTS, **offered)
    with serve(files) as address, pytest.raises(CheckpointError, match=message):
        download(f'{address}/a.pth')
    assert not (hub / 'a.pth').exists() and len(files.asked) == requests


def test_no_server():
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))  # and nobody listens
        with pytest.raises(CheckpointError, match=r'a\.pth: download given up .*refused'):
            download(f'http://127.0.0.1:{taken.getsockname()[1]}/a.pth')


def test_a_hash_in_the_name(hub):
    name = f'a-{hashlib.sha256(CONTENTS).hexdigest()[:8]}.pth'
    with serve(Files(CONTENTS)) as address:
        assert download(f'{address}/{name}').read_bytes() == CONTENTS
        with pytest.raises(CheckpointError, match='begins with 01234567, got '):
            download(f'{address}/a-01234567.pth')
    assert not (hub / 'a-01234567.pth').exists()


def test_several_at_once_download_once(hub):
    files = Files(CONTENTS, breaks=[100_000])
    with serve(files) as address, ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(download, [f'{address}/a.pth'] * 4))
    assert paths == [hub / 'a.pth'] * 4 and (hub / 'a.pth').read_bytes() == CONTENTS
    assert len(files.asked) == 2 and [path.name for path in hub.iterdir()] == ['a.pth']


def test_reading_an_address(hub, tmp_path):
    torch.save({'state_dict': {'a': torch.ones(2)}}, tmp_path / 'a.pth')
    with serve(Files((tmp_path / 'a.pth').read_bytes(), breaks=[50])) as address:
        assert torch.equal(read(f'{address}/b.pth')['state_dict']['a'], torch.ones(2))
    assert (hub / 'b.pth').exists()
