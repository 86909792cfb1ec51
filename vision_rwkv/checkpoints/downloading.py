"""Downloads that survive broken connections, into torch.hub's cache, whole or not at all."""

import fcntl
import hashlib
import http.client
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlparse

import torch
from torch.hub import tqdm

from vision_rwkv.checkpoints._errors import CheckpointError, about

ATTEMPTS = 5  # in a row that brought nothing
PAUSE = 1.0  # seconds before the second attempt; doubles with each
TIMEOUT = 60.0  # seconds without a byte
BLOCK = 1 << 20
BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def download(url: str, folder: str | Path | None = None) -> Path:
    """The file of an http(s) URL, downloaded unless ``folder``, by default torch.hub's cache, has one of that name.

    A broken connection is taken up where it broke if the server can, from the start if not. The file appears under its
    name when it is complete; processes that want it at once wait for the one that downloads. A name with a hash, as
    torch.hub has them (name-0123abcd.pth), is checked against the contents.

    Raises:
        CheckpointError: the server has no such file, breaks off again and again, or sends something else.
    """
    folder = Path(folder or Path(torch.hub.get_dir(), 'checkpoints'))
    target = folder / Path(urlparse(url).path).name
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f'{target.name}.partial')
    with about(url), os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o644), 'r+b') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if target.is_file():  # another process had the lock, and is done
            partial.unlink(missing_ok=True)
            return target
        _fetch(url, file)
        file.flush()
        os.fsync(file.fileno())
        _check_hash(target.name, file)
        os.replace(partial, target)
    return target


def _empty(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()


def _fetch(url: str, file: BinaryIO) -> None:
    """Fill ``file`` with what ``url`` gives, in as many attempts as it takes."""
    _empty(file)  # what an earlier process left may be of another version
    version, failed = None, 0
    with tqdm(unit='B', unit_scale=True, unit_divisor=1024, desc=Path(urlparse(url).path).name) as bar:
        while True:
            before = file.tell()
            reason = 'the connection ended early'
            try:
                with _open(url, before, version) as response:
                    version = response.headers.get('ETag') or response.headers.get('Last-Modified')
                    if response.status != 206:
                        _empty(file)
                    bar.total = _length(response, file.tell())
                    bar.update(file.tell() - bar.n)
                    while block := response.read(BLOCK):
                        file.write(block)
                        bar.update(len(block))
            except urllib.error.HTTPError as error:
                if error.code < 500:
                    raise CheckpointError(f'the server says {error.code} {error.reason}') from error
                reason = f'the server says {error.code} {error.reason}'
            except BROKEN as error:
                reason = str(error)
            if file.tell() == bar.total:
                return
            failed = 0 if file.tell() > before else failed + 1
            if failed == ATTEMPTS:
                raise CheckpointError(f'download given up after {file.tell()} bytes and {ATTEMPTS} attempts: {reason}')
            time.sleep(PAUSE * 2**failed / 2)


def _open(url: str, start: int, version: str | None) -> http.client.HTTPResponse:
    """The response of the server, from byte ``start`` if it still has that ``version`` of the file."""
    headers = {'User-Agent': 'vision-rwkv'}
    if start and version:
        headers |= {'Range': f'bytes={start}-', 'If-Range': version}
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)


def _length(response: http.client.HTTPResponse, start: int) -> int:
    """The bytes of the whole file, of which this response brings those from ``start``."""
    length = response.headers.get('Content-Length')
    if length is None:
        raise CheckpointError('the server does not say how long the file is')
    return start + int(length)


def _check_hash(name: str, file: BinaryIO) -> None:
    expected = re.search(r'-([0-9a-f]{8,})\.', name)
    if not expected:
        return
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(BLOCK):
        digest.update(block)
    if not digest.hexdigest().startswith(expected[1]):
        raise CheckpointError(f'its name promises a SHA-256 that begins with {expected[1]}, got {digest.hexdigest()}')
