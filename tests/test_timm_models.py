"""The properties that timm's own tests ask of a model, for the seven entry points; and their released files."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, is_model_pretrained
from timm.optim import param_groups_layer_decay

import vision_rwkv  # noqa: F401
from vision_rwkv.backbones import VRWKV
from vision_rwkv.checkpoints import CheckpointError

sys.path.insert(0, str(Path(__file__).parent / 'checkpoints'))
from released import cheap, shapes_of, tensors_of  # noqa: E402
from server import Files, serve  # noqa: E402

PARAMS = {
    'vrwkv_tiny_patch16_224': 6.2,
    'vrwkv_small_patch16_224': 23.8,
    'vrwkv_base_patch16_224': 93.7,
    'vrwkv_large_patch16_384': 334.9,
    'vrwkv6_tiny_patch16_224': 7.6,
    'vrwkv6_small_patch16_224': 27.7,
    'vrwkv6_base_patch16_224': 104.9,
}
TINY = ['vrwkv_tiny_patch16_224', 'vrwkv6_tiny_patch16_224']
LARGE = 'vrwkv_large_patch16_384'


def make(name, **arguments):
    """A shallow model, narrow if it is not a tiny one; small images are enough for it."""
    narrow = {} if name in TINY else {'embed_dims': 64, **({'num_heads': 1} if name.startswith('vrwkv6') else {})}
    narrow |= {'hidden_dim': 96} if name == LARGE else {}
    return timm.create_model(name, **{'depth': 2, **narrow, **arguments})


IMAGE = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('name', PARAMS)
def test_default_cfg(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMS[name], abs=0.06)
    cfg, state = model.default_cfg, model.state_dict()
    assert f'{cfg["classifier"]}.weight' in state and f'{cfg["first_conv"]}.weight' in state
    assert model.get_classifier() is model.get_submodule(cfg['classifier'])
    assert len(state[f'{cfg["classifier"]}.weight']) == model.num_classes == cfg['num_classes'] == 1000
    large = name == LARGE
    assert cfg['input_size'] == ((3, 384, 384) if large else (3, 224, 224))
    assert cfg['url'].startswith('https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv')
    assert is_model_pretrained(name)
    released = {'vrwkv_tiny_patch16_224': 'vrwkv_t', LARGE: 'vrwkv_l_384', 'vrwkv6_tiny_patch16_224': 'vrwkv6_t'}
    if name in released:
        expected = shapes_of(released[name])
        expected = {
            n.replace('.0.', '.layers.pre_logits.', 1) if n.startswith('head.0') else n: s for n, s in expected.items()
        }
        expected = {
            n.replace('.2.', '.layers.head.', 1) if n.startswith('head.2') else n: s for n, s in expected.items()
        }
        assert {n: tuple(tensor.shape) for n, tensor in state.items()} == expected


@pytest.mark.parametrize('name', PARAMS)
def test_forward_and_backward(name):
    model = make(name, num_classes=42)
    out = model(IMAGE)
    assert out.shape == (2, 42) and out.isfinite().all()
    out.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('name', [*TINY, LARGE])
def test_heads(name):
    model = make(name).eval()
    hidden, width = model.head_hidden_size, model.num_features
    tokens = model.forward_features(IMAGE)
    assert tokens.shape == (2, 12, width)
    assert model.forward_head(tokens, pre_logits=True).shape == (2, hidden)
    assert torch.equal(model.forward_head(tokens), model(IMAGE))
    logits = model.get_classifier()(model.forward_head(tokens, pre_logits=True))
    assert torch.equal(logits, model(IMAGE))

    model.reset_classifier(0)
    assert model(IMAGE).shape == (2, hidden) and model.num_classes == 0
    model.reset_classifier(0, '')
    assert torch.equal(model(IMAGE), tokens)
    assert make(name, num_classes=0, global_pool='').eval()(IMAGE).shape == (2, 12, width)
    model.reset_classifier(7, 'max')
    assert model(IMAGE).shape == (2, 7) and model.num_classes == 7
    assert model.get_classifier().weight.std().item() == pytest.approx(0.02, rel=0.15)
    for pool, pooled in (
        ('avg', tokens.mean(1)),
        ('max', tokens.amax(1)),
        ('avgmax', (tokens.mean(1) + tokens.amax(1)) / 2),
    ):
        model.reset_classifier(0, pool)
        expected = model.head.layers.pre_logits(pooled).tanh() if name == LARGE else pooled
        assert torch.equal(model(IMAGE), expected)


@pytest.mark.parametrize('name', TINY)
def test_state_dict_round_trip(name):
    model, other = make(name).eval(), make(name).eval()
    assert not torch.equal(model(IMAGE), other(IMAGE))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(IMAGE), other(IMAGE))


@pytest.mark.parametrize('name', TINY)
def test_arguments(name):
    assert make(name, in_chans=1)(IMAGE[:, :1]).shape == (2, 1000)
    model = make(name, img_size=(64, 48), drop_path_rate=0.2, drop_rate=0.1)
    assert model.backbone.pos_embed.shape[1] == 12
    assert [layer.drop_path.drop_prob for layer in model.backbone.layers] == [0.0, 0.2]
    assert model.head.drop.p == 0.1
    with pytest.raises(ValueError, match="global_pool must be 'avg' or 'max' or 'avgmax' or '', got 'token'"):
        make(name, global_pool='token')
    with pytest.raises(ValueError, match='num_classes must be at least 0'):
        make(name, num_classes=-1)


@pytest.mark.parametrize('name', TINY)
def test_grad_checkpointing(name):
    model = make(name, num_classes=3)

    def gradients(enable):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(IMAGE).sum().backward()
        return [layer.with_cp for layer in model.backbone.layers], [p.grad.clone() for p in model.parameters()]

    (on, with_it), (off, without) = gradients(True), gradients(False)
    assert all(on) and not any(off)
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))


@pytest.mark.parametrize('name', TINY)
def test_features_only(name):
    whole = make(name, depth=4).eval()
    features = make(name, depth=4, features_only=True, out_indices=(0, -2)).eval()
    features.load_state_dict({f'model.{n}': t for n, t in whole.state_dict().items()}, strict=False)
    assert len(features.model.backbone.layers) == 3  # the last one is not needed
    assert features.feature_info.channels() == [192, 192] and features.feature_info.reduction() == [16, 16]
    maps = features(IMAGE)
    expected = VRWKV if name.startswith('vrwkv_') else type(whole.backbone)
    assert isinstance(whole.backbone, expected)
    whole.backbone.out_indices = (0, 2)
    for found, wanted in zip(maps, whole.backbone(IMAGE), strict=True):
        assert torch.equal(found, wanted) and found.shape == (2, 192, 4, 3)
    assert len(make(name, depth=4, features_only=True)(IMAGE)) == 3


@pytest.mark.parametrize('name', TINY)
def test_intermediates(name):
    model = make(name, depth=3).eval()
    final, all_of_them = model.forward_intermediates(IMAGE)
    assert torch.equal(final, model.forward_features(IMAGE)) and len(all_of_them) == 3
    tokens = model.get_intermediate_layers(IMAGE, 2)
    maps = model.get_intermediate_layers(IMAGE, (1, 2), reshape=True)
    for flat, whole, expected in zip(tokens, maps, all_of_them[1:], strict=True):
        assert torch.equal(whole, expected) and torch.equal(flat, whole.flatten(2).transpose(1, 2))
    (normed,) = model.get_intermediate_layers(IMAGE, norm=True)
    assert torch.equal(normed, final)
    asked = model.forward_intermediates(IMAGE, [0], output_dict=True, output_fmt='NLC', stop_early=False)
    assert torch.equal(asked['image_features'], final) and len(asked['image_intermediates']) == 1
    with pytest.raises(ValueError, match='output_fmt'):
        model.forward_intermediates(IMAGE, output_fmt='NHWC')


@pytest.mark.parametrize('name', [*TINY, LARGE])
def test_group_matcher(name):
    """The layer-wise decay of timm: stem, one group for each layer, final norm and head."""
    model = make(name, depth=3)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale_of = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.startswith(('backbone.patch_embed', 'backbone.pos_embed')):
            expected = 0.5**4
        elif parameter_name.startswith('backbone.layers.'):
            expected = 0.5 ** (3 - int(parameter_name.split('.')[2]))
        else:
            expected = 1.0
        assert scale_of[id(parameter)] == expected, parameter_name
    assert len(scale_of) == len(list(model.parameters()))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    return tmp_path / 'hub/checkpoints'


@pytest.fixture
def released(tmp_path):
    """VRWKV-T's file, with old metadata, and the tensors of it that tell it apart."""
    tensors = tensors_of('vrwkv_t')
    tensors['backbone.pos_embed'] = torch.randn(1, 196, 192)
    tensors['backbone.patch_embed.projection.weight'] = torch.randn(192, 3, 16, 16)
    tensors['head.fc.bias'] = torch.randn(1000)
    torch.save({'meta': {'mmcls_version': '0.25.0'}, 'state_dict': tensors}, tmp_path / 'vrwkv_t.pth')
    return tmp_path / 'vrwkv_t.pth', tensors


def test_pretrained_files(released, hub):
    path, tensors = released
    name = TINY[0]
    with serve(Files(path.read_bytes(), breaks=[500])) as address:
        overlay = {'url': f'{address}/some_t.pth'}
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    assert (hub / 'some_t.pth').exists()
    assert torch.equal(model.backbone.pos_embed, tensors['backbone.pos_embed'])
    assert torch.equal(model.head.fc.bias, tensors['head.fc.bias'])

    local = {'pretrained': True, 'pretrained_cfg_overlay': {'file': str(path)}}
    model = timm.create_model(name, num_classes=5, in_chans=1, img_size=112, **local)
    summed = tensors['backbone.patch_embed.projection.weight'].sum(1, keepdim=True)
    assert torch.allclose(model.backbone.patch_embed.projection.weight, summed, atol=1e-5)
    assert model.backbone.pos_embed.shape == (1, 49, 192) and model.backbone.pos_embed.std() > 0.1
    assert model.head.fc.weight.shape == (5, 192) and model.head.fc.weight.std() > 0.01
    features = timm.create_model(name, features_only=True, **local)
    assert torch.equal(features.model.backbone.pos_embed, tensors['backbone.pos_embed'])
    with pytest.raises(CheckpointError, match=r'unexpected in the file: backbone\.layers\.2\.'):
        timm.create_model(name, depth=2, **local)


def test_large_pretrained_file(tmp_path):
    tensors = {n: t for n, t in tensors_of('vrwkv_l_384').items() if not n.startswith('backbone.layers.')}
    tensors |= {n: cheap(*s) for n, s in shapes_of('vrwkv_l_384').items() if n.startswith('backbone.layers.0.')}
    tensors['head.2.bias'] = torch.randn(1000)
    torch.save({'model': tensors}, tmp_path / 'l.pth')
    overlay = {'file': str(tmp_path / 'l.pth')}
    model = timm.create_model(LARGE, pretrained=True, pretrained_cfg_overlay=overlay, depth=1)
    assert torch.equal(model.get_classifier().bias, tensors['head.2.bias'])


def test_released_names():
    files = {get_pretrained_cfg(name).url.rpartition('/')[2] for name in PARAMS}
    assert files == {
        'vrwkv_t_in1k_224.pth',
        'vrwkv_s_in1k_224.pth',
        'vrwkv_b_in1k_224.pth',
        'vrwkv_l_22kto1k_384.pth',
        'vrwkv6_t_in1k_224.pth',
        'vrwkv6_s_in1k_224.pth',
        'vrwkv6_b_in1k_224.pth',
    }


def test_operators_do_without_timm():
    code = (
        'import sys; sys.modules["timm"] = None; import vision_rwkv.ops; import torch\n'
        'k = torch.ones(1, 4, 2); print(vision_rwkv.ops.bi_wkv(k[0, 0], k[0, 0], k, k).shape)'
    )
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'torch.Size([1, 4, 2])'
