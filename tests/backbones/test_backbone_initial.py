"""Initial values against numbers worked out from the formulas, channel by channel."""

import math

import pytest
import torch

from vision_rwkv.backbones import VRWKV, VRWKV6

SETTINGS = {'img_size': 16, 'patch_size': 4}


def close(parameter, values):
    torch.testing.assert_close(parameter.detach().flatten(), torch.tensor(values), rtol=1e-6, atol=1e-7)


def test_vrwkv_by_hand():
    # 4 channels; layer 1 of 3: p = 1/2, q = 2/3, decay power 0.7 + 0.65 = 1.35
    model = VRWKV(embed_dims=4, depth=3, **SETTINGS)
    att, ffn = model.layers[1].att, model.layers[1].ffn
    close(att.spatial_decay, [-5, -3.18458344, -0.37228306, 3])
    close(att.spatial_first, [-1.2039728, -0.7039728, -1.7039728, -1.2039728])
    close(att.spatial_mix_k, [0, 0.39685026, 0.62996052, 0.82548181])
    close(att.spatial_mix_v, [0.15, 0.54685026, 0.77996052, 0.97548181])
    close(att.spatial_mix_r, [0, 0.62996052, 0.79370053, 0.90856029])
    close(ffn.spatial_mix_k, [0, 0.39685026, 0.62996052, 0.82548181])
    close(ffn.spatial_mix_r, [0, 0.39685026, 0.62996052, 0.82548181])


@pytest.mark.parametrize('layer', [0, 1, 4])
def test_vrwkv_fancy(layer):
    channels, depth = 24, 5
    model = VRWKV(embed_dims=channels, depth=depth, **SETTINGS)
    att, ffn = model.layers[layer].att, model.layers[layer].ffn
    p, q = layer / (depth - 1), 1 - layer / depth
    cs = range(channels)
    close(att.spatial_decay, [-5 + 8 * (c / (channels - 1)) ** (0.7 + 1.3 * p) for c in cs])
    close(att.spatial_first, [math.log(0.3) + 0.5 * ((c + 1) % 3 - 1) for c in cs])
    close(att.spatial_mix_k, [(c / channels) ** q for c in cs])
    close(att.spatial_mix_v, [(c / channels) ** q + 0.3 * p for c in cs])
    close(att.spatial_mix_r, [(c / channels) ** (q / 2) for c in cs])
    close(ffn.spatial_mix_k, [(c / channels) ** q for c in cs])
    close(ffn.spatial_mix_r, [(c / channels) ** q for c in cs])


@pytest.mark.parametrize(('mode', 'scalar', 'mix'), [('local', 1.0, 1.0), ('global', 0.0, 0.5)])
def test_vrwkv_other_modes(mode, scalar, mix):
    model = VRWKV(embed_dims=8, depth=2, init_mode=mode, **SETTINGS)
    for layer in model.layers:
        for parameter in (layer.att.spatial_decay, layer.att.spatial_first):
            close(parameter, [scalar] * 8)
        att, ffn = layer.att, layer.ffn
        for parameter in (
            att.spatial_mix_k,
            att.spatial_mix_v,
            att.spatial_mix_r,
            ffn.spatial_mix_k,
            ffn.spatial_mix_r,
        ):
            close(parameter, [mix] * 8)


@pytest.mark.parametrize('layer', [0, 1, 3])
def test_vrwkv6_fancy(layer):
    channels, depth = 128, 4
    model = VRWKV6(embed_dims=channels, num_heads=2, depth=depth, **SETTINGS)
    att, ffn = model.layers[layer].att, model.layers[layer].ffn
    p, q = layer / (depth - 1), 1 - layer / depth
    cs = range(channels)
    for parameter in (att.time_maa_x, att.time_maa_w, att.time_maa_k):
        close(parameter, [1 - (c / channels) ** q for c in cs])
    close(att.time_maa_v, [1 - ((c / channels) ** q + 0.3 * p) for c in cs])
    for parameter in (att.time_maa_r, att.time_maa_g):
        close(parameter, [1 - (c / channels) ** (q / 2) for c in cs])
    close(att.time_decay, [-6 + 5 * (c / (channels - 1)) ** (0.7 + 1.3 * p) for c in cs])
    close(att.time_faaaa, [p * (1 - c / (channels - 1)) + 0.1 * ((c + 1) % 3 - 1) for c in cs])
    for parameter in (ffn.spatial_mix_k, ffn.spatial_mix_r):
        close(parameter, [(c / channels) ** q for c in cs])
    for parameter in (att.time_maa_w1, att.time_maa_w2, att.time_decay_w1, att.time_decay_w2):
        assert parameter.min() >= -1e-4 and parameter.max() <= 1e-4
        assert parameter.std().item() == pytest.approx(1e-4 / 3**0.5, rel=0.05)  # uniform


@pytest.mark.parametrize('version', [VRWKV, VRWKV6])
def test_the_rest(version):
    sizes = {'embed_dims': 192} if version is VRWKV else {'embed_dims': 192, 'num_heads': 3}
    model = version(depth=2, key_norm=True, init_values=0.5, **sizes, **SETTINGS)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.bias is None
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.03), name
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm)):
            assert (module.weight == 1).all() and (module.bias == 0).all() and module.eps == 1e-5
    for layer in model.layers:
        assert (layer.gamma1 == 0.5).all() and (layer.gamma2 == 0.5).all()
    assert not model.pos_embed.any()
    # PyTorch's own initial values of a convolution: uniform within 1 / sqrt(fan in)
    bound = (3 * 4 * 4) ** -0.5
    weight = model.patch_embed.projection.weight
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_class_token_starts_at_zero():
    assert not VRWKV6(depth=1, with_cls_token=True, **SETTINGS).cls_token.any()


def test_one_layer_is_the_first_layer():
    model = VRWKV(embed_dims=8, depth=1, **SETTINGS)  # p = 0, q = 1
    close(model.layers[0].att.spatial_decay, [-5 + 8 * (c / 7) ** 0.7 for c in range(8)])
    close(model.layers[0].att.spatial_mix_v, [c / 8 for c in range(8)])
