"""Nothing in a file is run: old metadata is inert, everything else is refused."""

import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch

from vision_rwkv.checkpoints import CheckpointError, read


@pytest.fixture
def old_classes(monkeypatch):
    """Modules of the past, there while a file is written and gone when it is read. Their code must not run."""
    ran = []

    class ConfigDict(dict):  # as addict's
        def __getnewargs__(self):
            return tuple(self.items())

        def __getstate__(self):
            return self

        def __setstate__(self, state):
            ran.append('__setstate__')

    class CfgNode(dict):  # as yacs': a dict with attributes
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.__dict__.update(__immutable__=True, __deprecated_keys__=set(), __renamed_keys__={})

    class Slotted:
        __slots__ = ('level',)

    def make():
        ran.append('make')
        return types.SimpleNamespace()

    class Reduced:
        def __reduce__(self):
            return make, ()

    places = {'mmcv.utils.config': [ConfigDict], 'yacs.config': [CfgNode], 'mmcls.core': [Slotted, make]}
    for module_name, members in places.items():
        for length in range(1, module_name.count('.') + 2):
            name = '.'.join(module_name.split('.')[:length])
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        for member in members:
            member.__module__, member.__qualname__ = module_name, member.__name__
            setattr(sys.modules[module_name], member.__name__, member)
    slotted = Slotted()
    slotted.level = 3
    yield {
        'config': ConfigDict(model=ConfigDict(type='ImageClassifier')),
        'yacs': CfgNode(MODEL=CfgNode(DROP_PATH=0.1, NAMES=['a', 'b'])),
        'slotted': slotted,
        'reduced': Reduced(),
        'score': np.float64(75.1),
        'scores': np.arange(3.0),
    }
    assert ran in ([], ['make'])


@pytest.mark.parametrize('legacy', [False, True])
def test_old_metadata_is_inert(old_classes, legacy, tmp_path, monkeypatch):
    weight = torch.randn(3)
    torch.save(
        {'meta': old_classes, 'model': {'a': weight}}, tmp_path / 'a.pth', _use_new_zipfile_serialization=not legacy
    )
    for name in ('mmcv', 'mmcv.utils', 'mmcv.utils.config', 'yacs', 'yacs.config', 'mmcls', 'mmcls.core'):
        monkeypatch.delitem(sys.modules, name)
    contents = read(tmp_path / 'a.pth')
    assert torch.equal(contents['model']['a'], weight)
    assert contents['meta']['yacs']['MODEL'] == {'DROP_PATH': 0.1, 'NAMES': ['a', 'b']}
    assert contents['meta']['config']['model']['type'] == 'ImageClassifier'
    assert 'mmcv' not in sys.modules and 'yacs' not in sys.modules


class Evil:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Method:
    """Pickles as a method got by getattr."""

    def __reduce__(self):
        return getattr, (torch.Size, 'numel')

    def __call__(self):
        pass


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize(
    ('function', 'arguments', 'named'),
    [
        (os.system, ('touch ran',), 'posix'),
        (eval, ('open("ran", "w")',), 'eval'),
        (Method(), (), '_Nothing'),
        (types.SimpleNamespace, (), 'SimpleNamespace'),
    ],
)
def test_anything_else_is_refused(function, arguments, named, legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    contents = {'state_dict': {'a': torch.zeros(1)}, 'meta': Evil(function, *arguments)}
    torch.save(contents, 'a.pth', _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=rf'^a\.pth: refused: .*{named}'):
        read('a.pth')
    assert not os.path.exists('ran')


def test_a_tolerated_name_is_not_imported(tmp_path, monkeypatch):
    """`mmcv.evil` in a file does not even import a module of that name that is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'mmcls.py').write_text('open("ran", "w")\ndef evil(): open("ran", "w")\n')
    code = b'\x80\x02}q\x00X\x04\x00\x00\x00metacmmcls\nevil\nq\x01)Rq\x02s.'
    torch.save({}, 'a.pth')
    import zipfile

    with zipfile.ZipFile('a.pth') as old, zipfile.ZipFile('b.pth', 'w') as new:
        for name in old.namelist():
            new.writestr(name, code if name.endswith('data.pkl') else old.read(name))
    assert read('b.pth') == {'meta': {}}
    assert not os.path.exists('ran')


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match='there is no such file'):
        read(tmp_path / 'none.pth')
    torch.save({'state_dict': {'a': torch.zeros(1000)}}, tmp_path / 'whole.pth')
    whole = (tmp_path / 'whole.pth').read_bytes()
    (tmp_path / 'cut.pth').write_bytes(whole[: len(whole) // 2])
    (tmp_path / 'empty.pth').write_bytes(b'')
    (tmp_path / 'text.pth').write_text('<html>Not found</html>')
    (tmp_path / 'pickle.pth').write_bytes(pickle.dumps({'a': 1}))
    (tmp_path / 'bad.safetensors').write_bytes(b'nonsense' * 4)
    for name in ('cut.pth', 'empty.pth', 'text.pth', 'pickle.pth', 'bad.safetensors'):
        with pytest.raises(CheckpointError, match=rf'/{name}: (refused|not a)'):
            read(tmp_path / name)
    torch.save([torch.zeros(1)], tmp_path / 'list.pth')
    with pytest.raises(CheckpointError, match='expected a dict in it, got list'):
        read(tmp_path / 'list.pth')


def test_safetensors(tmp_path):
    from safetensors.torch import save_file

    save_file({'a': torch.arange(3.0)}, tmp_path / 'a.safetensors')
    assert torch.equal(read(tmp_path / 'a.safetensors')['a'], torch.arange(3.0))
