"""A dense model's backbone starts from a classification checkpoint: all of it, or an error; the rest is named."""

from pathlib import Path

import pytest
import torch
from dense_configs import DIGITS, load, models

import dense
from vision_rwkv.backbones import VRWKV, VRWKV6
from vision_rwkv.checkpoints import CheckpointError

SMALL = {'embed_dims': 64, 'depth': 4, 'img_size': 64}
ADAPTERS = {'vrwkv': (VRWKV, dense.VRWKVAdapter, {}), 'vrwkv6': (VRWKV6, dense.VRWKV6Adapter, {'num_heads': 1})}
LAYOUTS = {
    'ours': lambda state: {'state_dict': state, 'meta': {'epoch': 3}},
    'model': lambda state: {'model': state, 'optimizer': {}},
    'module': lambda state: {'module': {f'module.{name}': value for name, value in state.items()}},
    'bare': lambda state: state,
    'backbone': lambda state: {n.removeprefix('backbone.'): v for n, v in state.items() if n.startswith('backbone.')},
}


def classifier(version: str = 'vrwkv') -> dict[str, torch.Tensor]:
    """The tensors of a small classification model."""
    plain, _, more = ADAPTERS[version]
    torch.manual_seed(1)
    state = {f'backbone.{name}': torch.randn_like(value) for name, value in plain(**SMALL, **more).state_dict().items()}
    return state | {'head.fc.weight': torch.zeros(10, 64), 'head.fc.bias': torch.zeros(10)}


def adapter(path: Path, version: str = 'vrwkv', **changes) -> torch.nn.Module:
    """An adapter that is to start from ``path``."""
    _, kind, more = ADAPTERS[version]
    start = {'type': 'Pretrained', 'checkpoint': str(path)}
    return kind(**{**SMALL, **more, 'deform_num_heads': 4, 'conv_inplane': 8, **changes}, init_cfg=start)


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What is logged of the tensors that do not match."""
    messages = []
    monkeypatch.setattr('openmmlab.pretrained.print_log', lambda message, **_: messages.append(message))
    return messages


@pytest.mark.parametrize(('version', 'layout'), [*(('vrwkv', layout) for layout in LAYOUTS), ('vrwkv6', 'ours')])
def test_layouts(version, layout, tmp_path, said):
    state = classifier(version)
    torch.save(LAYOUTS[layout](state), tmp_path / 'start.pth')
    model = adapter(tmp_path / 'start.pth', version)
    model.init_weights()
    own = {'level_embed', 'spm', 'interactions', 'up', 'norm1', 'norm2', 'norm3', 'norm4'}
    new = [name for name in model.state_dict() if name.split('.')[0] in own]
    for name, value in model.state_dict().items():
        assert name in new or torch.equal(value, state[f'backbone.{name}']), name
    unused = ['backbone.ln1.weight', 'backbone.ln1.bias', 'head.fc.weight', 'head.fc.bias']
    unused = unused[: 2 if layout == 'backbone' else 4]
    assert said == [
        f'{tmp_path}/start.pth: {len(new)} tensors keep their initial values: {", ".join(new)}',
        f'{tmp_path}/start.pth: {len(unused)} tensors of the file are not used: {", ".join(unused)}',
    ]


def test_another_image_size_gets_resized_positions(tmp_path):
    torch.save(classifier(), tmp_path / 'start.pth')
    model = adapter(tmp_path / 'start.pth', img_size=96)
    model.init_weights()
    assert model.pos_embed.shape == (1, 36, 64) and model.pos_embed.std() > 0.1


def test_layer_scales_of_1_may_be_new_and_others_not(tmp_path):
    torch.save(classifier(), tmp_path / 'start.pth')
    model = adapter(tmp_path / 'start.pth', init_values=1.0)
    model.init_weights()
    assert model.layers[0].gamma1.eq(1).all()
    with pytest.raises(CheckpointError, match=r'start\.pth: .*missing from the file: backbone\.layers\.0\.gamma1'):
        adapter(tmp_path / 'start.pth', init_values=0.5).init_weights()


@pytest.mark.parametrize(
    ('contents', 'problem'),
    [
        (lambda state: {'state_dict': {'fc.weight': torch.zeros(2)}}, r'missing from the file: backbone\.pos_embed'),
        (lambda state: {n: v for n, v in state.items() if 'layers.2.att' not in n}, r'missing .*layers\.2\.att\.key'),
        (
            lambda state: {**state, 'backbone.layers.4.x': torch.zeros(1)},
            r'unexpected in the file: .*\.layers\.4',
        ),
        (lambda state: {n: v[..., None] for n, v in state.items()}, r'has the shape .* in the file, .* in the model'),
        (lambda state: [1, 2], 'expected a dict in it, got list'),
        (None, 'there is no such file'),
    ],
)
def test_what_does_not_fit_changes_nothing(contents, problem, tmp_path):
    if contents:
        torch.save(contents(classifier()), tmp_path / 'start.pth')
    model = adapter(tmp_path / 'start.pth')
    before = {name: value.clone() for name, value in model.layers.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf'start\.pth: .*{problem}'):
        model.init_weights()
    assert all(torch.equal(value, before[name]) for name, value in model.layers.state_dict().items())


@pytest.mark.parametrize('name', DIGITS)
def test_init_cfg_of_a_config(name, tmp_path):
    cfg = load(name).cfg
    torch.manual_seed(1)
    plain = VRWKV(embed_dims=64, depth=4, img_size=160, init_values=0.5)
    state = {f'backbone.{key}': value for key, value in plain.state_dict().items()}
    torch.save({'state_dict': state}, tmp_path / 'a.pth')
    cfg.model.backbone.init_cfg = {'type': 'Pretrained', 'checkpoint': str(tmp_path / 'a.pth')}
    model = models(name).build(cfg.model)
    model.init_weights()
    for key, value in plain.layers.state_dict().items():
        assert torch.equal(model.backbone.layers.state_dict()[key], value), key
