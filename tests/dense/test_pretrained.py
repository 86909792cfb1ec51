"""A dense model's backbone starts from a classification checkpoint, and says what did not match."""

import pytest
import torch
from dense_configs import DIGITS, load, models
from mmengine.registry import init_default_scope

from vision_rwkv.backbones import VRWKV, VRWKVAdapter
from vision_rwkv.backbones.pretrained import load_backbone

SMALL = {'embed_dims': 48, 'depth': 4, 'img_size': 64}
LAYOUTS = {
    'ours': lambda state: {'state_dict': state, 'meta': {'epoch': 3}},
    'model': lambda state: {'model': state, 'optimizer': {}},
    'module': lambda state: {'module': {f'module.{name}': value for name, value in state.items()}},
    'bare': lambda state: state,
    'backbone': lambda state: {n.removeprefix('backbone.'): v for n, v in state.items() if n.startswith('backbone.')},
}


@pytest.fixture
def classifier() -> dict[str, torch.Tensor]:
    """The tensors of a classification model."""
    torch.manual_seed(1)
    backbone = VRWKV(**SMALL)
    state = {f'backbone.{name}': torch.randn_like(value) for name, value in backbone.state_dict().items()}
    return state | {'head.fc.weight': torch.zeros(10, 48), 'head.fc.bias': torch.zeros(10)}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts(layout, classifier, tmp_path):
    torch.save(LAYOUTS[layout](classifier), tmp_path / 'start.pth')
    model = VRWKVAdapter(**SMALL, conv_inplane=8)
    loaded = load_backbone(model, tmp_path / 'start.pth')
    for name, value in model.state_dict().items():
        if name.startswith(('layers.', 'patch_embed.', 'pos_embed')):
            assert torch.equal(value, classifier[f'backbone.{name}']), name
    assert {name.split('.')[0] for name in loaded.missing} == {
        *('level_embed', 'spm', 'interactions', 'up', 'norm1', 'norm2', 'norm3', 'norm4')
    }
    head = [] if layout == 'backbone' else ['head.fc.weight', 'head.fc.bias']
    assert loaded.unexpected == ['ln1.weight', 'ln1.bias', *head]
    assert loaded.misshapen == []


def test_url(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'cache'))
    torch.save({'state_dict': classifier}, tmp_path / 'start.pth')
    for _ in range(2):  # the second time from the cache
        loaded = load_backbone(VRWKVAdapter(**SMALL, conv_inplane=8), (tmp_path / 'start.pth').as_uri())
        assert loaded.misshapen == [] and 'ln1.weight' in loaded.unexpected
        (tmp_path / 'start.pth').unlink(missing_ok=True)


def test_shapes_that_differ_are_named(classifier, tmp_path):
    torch.save(classifier, tmp_path / 'start.pth')
    model = VRWKVAdapter(**{**SMALL, 'img_size': 96}, conv_inplane=8)
    before = model.pos_embed.clone()
    loaded = load_backbone(model, tmp_path / 'start.pth')
    assert loaded.misshapen == ['pos_embed: (1, 16, 48) in the file, (1, 36, 48) in the model']
    assert torch.equal(model.pos_embed, before)


def test_nothing_that_fits_is_an_error(classifier, tmp_path):
    torch.save({'state_dict': {'fc.weight': torch.zeros(2)}}, tmp_path / 'other.pth')
    model = VRWKVAdapter(**SMALL, conv_inplane=8)
    with pytest.raises(ValueError, match=r'other\.pth: no tensor of it fits VRWKVAdapter \(it has fc\.weight'):
        load_backbone(model, tmp_path / 'other.pth')
    torch.save({name: value[..., None] for name, value in classifier.items()}, tmp_path / 'wide.pth')
    with pytest.raises(ValueError, match=r'no tensor of it fits .* in the file, .* in the model'):
        load_backbone(model, tmp_path / 'wide.pth')
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(ValueError, match=r'list\.pth: expected a dict of tensors, got list'):
        load_backbone(model, tmp_path / 'list.pth')
    with pytest.raises(FileNotFoundError, match=r'nowhere\.pth'):
        load_backbone(model, tmp_path / 'nowhere.pth')


@pytest.mark.parametrize('name', DIGITS)
def test_init_cfg(name, tmp_path, monkeypatch):
    cfg, said = load(name).cfg, []
    monkeypatch.setattr('dense.backbones.print_log', lambda message, logger: said.append(message))
    torch.manual_seed(1)
    plain = VRWKV(embed_dims=64, depth=4, img_size=160, init_values=0.5)
    torch.save(
        {'state_dict': {f'backbone.{key}': value for key, value in plain.state_dict().items()}}, tmp_path / 'a.pth'
    )
    cfg.model.backbone.init_cfg = {'type': 'Pretrained', 'checkpoint': str(tmp_path / 'a.pth')}
    init_default_scope(cfg.default_scope)
    model = models(name).build(cfg.model)
    model.backbone.init_weights()
    assert torch.equal(model.backbone.layers[3].ffn.key.weight, plain.layers[3].ffn.key.weight)
    assert said[0].startswith(f'VRWKVAdapter starts from {tmp_path}/a.pth')
    assert 'tensors not in the file: level_embed, spm.stem.0.weight' in said[1]
    assert said[2:] == ['2 tensors not in the model: ln1.weight, ln1.bias']
