"""Clean files out of any layout, whole or not at all."""

import pickletools
import sys
import zipfile

import pytest
import torch
from scripts import ROOT, call

from tools import convert_checkpoint
from vision_rwkv.backbones import VRWKV
from vision_rwkv.checkpoints import load, read

SCRIPT = (sys.executable, ROOT / 'tools/convert_checkpoint.py')


@pytest.fixture(scope='module')
def state():
    return VRWKV(img_size=16, patch_size=8, embed_dims=16, depth=1).state_dict()


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_clean_file(suffix, state, tmp_path):
    released = {f'module.backbone.{name}': tensor for name, tensor in state.items()}
    head = {f'module.head.{i}.{item}': torch.ones(2, 2) for i in (0, 2) for item in ('weight', 'bias')}
    torch.save({'model': released | head, 'config': torch.device('cpu')}, tmp_path / 'a.pth')
    out = tmp_path / f'b{suffix}'
    said = call(*SCRIPT, 'a.pth', out, cwd=tmp_path)
    assert said.stdout.startswith(f'{out}: {len(state) + 4} tensors, 0.0M numbers')
    contents = read(out)
    tensors = contents if suffix == '.safetensors' else contents.pop('state_dict')
    names = {f'backbone.{name}' for name in state}
    heads = {f'head.layers.{layer}.{item}' for layer in ('pre_logits', 'head') for item in ('weight', 'bias')}
    assert tensors.keys() == names | heads
    model = VRWKV(img_size=16, patch_size=8, embed_dims=16, depth=1)
    load(model, out)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.pth', out.name]
    if suffix == '.pth':
        assert not contents
        with zipfile.ZipFile(out) as archive:
            (pickled,) = (archive.read(name) for name in archive.namelist() if name.endswith('data.pkl'))
        asked = {argument for opcode, argument, _ in pickletools.genops(pickled) if opcode.name == 'GLOBAL'}
        assert asked == {'torch._utils _rebuild_tensor_v2', 'torch FloatStorage', 'collections OrderedDict'}


def test_errors_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'bad.pth').write_text('text')
    torch.save({'state_dict': {'a': torch.ones(1)}}, tmp_path / 'a.pth')
    for arguments, message in (
        (('none.pth', 'b.pth'), 'none.pth: there is no such file'),
        (('bad.pth', 'b.pth'), 'bad.pth: not a checkpoint'),
        (('a.pth', 'b.onnx'), r'ends in \.pth or \.safetensors, got b\.onnx'),
        (('a.pth', 'bad.pth/b.pth'), 'bad.pth'),
    ):
        monkeypatch.setattr(sys, 'argv', ['convert_checkpoint.py', *arguments])
        with pytest.raises(SystemExit, match=rf'^convert_checkpoint\.py: error: .*{message}'):
            convert_checkpoint.main()
    assert not (tmp_path / 'b.pth').exists()
