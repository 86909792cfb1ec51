"""Files made to hurt: each is refused, or read for what it is, and takes little memory or time."""

import copy
import json
import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from vision_rwkv.backbones import VRWKV
from vision_rwkv.checkpoints import CheckpointError, load, read

MANY = 1 << 40


def small() -> VRWKV:
    """A model whose position embedding is (1, 4, 16)."""
    torch.manual_seed(0)
    return VRWKV(img_size=16, patch_size=8, embed_dims=16, depth=1)


def rewritten(path: Path, change=lambda name, contents: contents, compression=zipfile.ZIP_STORED) -> Path:
    """The file that torch.save wrote, its entries changed."""
    other = path.with_name('other.pth')
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, 'w', compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return other


@pytest.fixture
def saved(tmp_path) -> Path:
    """Four numbers in a file of torch.save."""
    torch.save({'state_dict': {'a': torch.arange(4.0)}}, tmp_path / 'a.pth')
    return tmp_path / 'a.pth'


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(path)


def test_a_zip_bomb(saved):
    """What it would unpack to is not even looked at."""
    bomb = rewritten(saved, lambda name, old: old + bytes(1 << 22) * name.endswith('.pkl'), zipfile.ZIP_DEFLATED)
    refused(bomb, r'other\.pth: refused: a/data\.pkl in it is compressed, to unpack to \d{7} bytes')


def test_a_zip_file_whose_entries_overlap(saved):
    with zipfile.ZipFile(saved, 'a') as archive:
        entry = max(archive.filelist, key=lambda entry: entry.file_size)
        for i in range(40):
            twin = copy.copy(entry)
            twin.filename = f'a/data/{i + 1}'
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
        archive._didModify = True
    refused(saved, r'refused: it claims to hold \d+ bytes, and has \d+')


NUMBERS, SHAPE = b'K\x04t', b'K\x04\x85'  # where the pickle has 4 numbers in storage, and the shape (4,)
LONG = b'\x8a\x06' + MANY.to_bytes(6, 'little')


@pytest.mark.parametrize('places', [[NUMBERS], [SHAPE], [NUMBERS, SHAPE]])
def test_a_tensor_that_claims_to_be_enormous(places, saved):
    def change(name, contents):
        for place in places if name.endswith('.pkl') else ():
            assert contents.count(place) == 1
            contents = contents.replace(place, LONG + place[2:])
        return contents

    refused(rewritten(saved, change), 'not a checkpoint, or a damaged one: (record size|Trying to resize)')


def test_a_position_embedding_of_a_few_bytes_that_stands_for_gigabytes(tmp_path):
    model = small()
    state = {**model.state_dict(), 'pos_embed': torch.zeros(1).expand(1, 10**12, 16)}
    torch.save(state, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='pos_embed: 64000000000000 bytes to resize, of which the file holds 4'):
        load(model, tmp_path / 'a.pth')


@pytest.mark.parametrize('tensor', [torch.eye(3).to_sparse(), torch.empty(3, device='meta')])
def test_tensors_without_all_their_numbers(tensor, tmp_path):
    torch.save({'state_dict': {'a': torch.ones(1)}, 'more': [{'b': tensor}]}, tmp_path / 'a.pth')
    refused(
        tmp_path / 'a.pth', 'refused: expected dense tensors, got one with torch.(sparse_coo on cpu|strided on meta)'
    )


def test_lists_within_lists(tmp_path):
    """A pickle of a few hundred bytes that a naive walk would not get through."""
    doubled: list = []
    for _ in range(80):
        doubled = [doubled, doubled]
    torch.save({'state_dict': {'a': torch.ones(1)}, 'meta': doubled}, tmp_path / 'a.pth')
    assert read(tmp_path / 'a.pth')['state_dict']['a'] == 1


def test_numbers_that_are_not_finite(tmp_path):
    state = copy.deepcopy(small().state_dict())
    state['ln1.weight'][:] = torch.nan
    state['ln1.bias'][3] = torch.inf
    torch.save(state, tmp_path / 'a.pth')
    model = small()
    with pytest.raises(CheckpointError, match=r'not finite, .*: ln1\.weight \(16 of 16\), .*bias \(1 of 16\)$'):
        load(model, tmp_path / 'a.pth')
    assert all(torch.equal(tensor, small().state_dict()[name]) for name, tensor in model.state_dict().items())


def test_large_numbers_are_finite(tmp_path):
    """Their sum is not."""
    model = small()
    model.ln1.weight.data[:] = 3e38
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    load(small(), tmp_path / 'a.pth')


def swapped(tensors: dict) -> dict:
    """The same numbers, their bytes in the other order."""
    return {name: torch.from_numpy(tensor.numpy().byteswap()) for name, tensor in tensors.items()}


def test_the_other_order_of_bytes(tmp_path, saved):
    """torch.save notes the order, so that the numbers are read as they were; safetensors has but one."""
    torch.save({'state_dict': swapped({'a': torch.arange(4.0)})}, saved)
    big = rewritten(saved, lambda name, old: b'big' if name.endswith('byteorder') else old)
    assert read(big)['state_dict']['a'].tolist() == [0, 1, 2, 3]
    refused(rewritten(saved, lambda name, old: b'odd' if name.endswith('byteorder') else old), 'not a checkpoint')

    model = small()
    save_file(swapped(model.state_dict()), tmp_path / 'a.safetensors')
    with pytest.raises(CheckpointError, match='not finite, from a run gone wrong or bytes in the wrong order: '):
        load(model, tmp_path / 'a.safetensors')


def safetensors(header: dict, contents: bytes, length: bytes | None = None) -> bytes:
    text = json.dumps(header).encode()
    return (length or struct.pack('<Q', len(text))) + text + contents


HEADER = {'a': {'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 16]}}


@pytest.mark.parametrize(
    'contents',
    [
        safetensors(HEADER, bytes(16), struct.pack('<Q', 1 << 60)),
        safetensors(HEADER, bytes(16), struct.pack('>Q', len(json.dumps(HEADER)))),
        safetensors(HEADER, bytes(8)),
        safetensors({'a': {**HEADER['a'], 'shape': [MANY]}}, bytes(16)),
        safetensors({'a': {**HEADER['a'], 'shape': [MANY], 'data_offsets': [0, 4 * MANY]}}, bytes(16)),
        safetensors({'a': {**HEADER['a'], 'shape': [MANY, MANY, MANY]}}, bytes(16)),
        safetensors({'a': {**HEADER['a'], 'data_offsets': [16, 0]}}, bytes(16)),
        safetensors({'a': HEADER['a'], 'b': HEADER['a']}, bytes(16)),
        save({'a': torch.arange(4.0)})[:-1],
        save({'a': torch.arange(4.0)})[:20],
        b'',
    ],
    ids=['long', 'big-endian', 'cut', 'shape', 'offsets', 'overflow', 'backwards', 'overlap', 'end', 'header', 'empty'],
)
def test_safetensors_that_are_none(contents, tmp_path):
    (tmp_path / 'a.safetensors').write_bytes(contents)
    refused(tmp_path / 'a.safetensors', r'^.*/a\.safetensors: not a safetensors file, or a damaged one: ')


@pytest.mark.parametrize('kind', ['zip', 'legacy', 'safetensors'])
def test_damage_at_random(kind, tmp_path):
    """Bytes changed, files cut: read, or refused as a checkpoint that is none."""
    tensors = {'a': torch.randn(3, 4), 'b.weight': torch.arange(5)}
    path = tmp_path / ('a.safetensors' if kind == 'safetensors' else 'a.pth')
    if kind == 'safetensors':
        save_file(tensors, path)
    else:
        contents = {'state_dict': tensors, 'meta': {'epoch': 3, 'more': [1.5, 'text', None]}}
        torch.save(contents, path, _use_new_zipfile_serialization=kind == 'zip')
    whole, rng, results = path.read_bytes(), random.Random(0), []
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 8])):
            damaged[rng.randrange(len(damaged))] = rng.choice([0, 255, rng.randrange(256)])
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        try:
            read(path)
            results.append('read')
        except CheckpointError:
            results.append('refused')
    assert results.count('refused') > 100
