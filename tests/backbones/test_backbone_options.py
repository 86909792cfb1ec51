"""Every option against a second, literal implementation in float64; then what options promise beyond values."""

import copy
import pickle

import golden
import pytest
import torch
import torch.nn.functional as F
from models import BOTH, images, make
from plain_model import Plain

from vision_rwkv.backbones import VRWKV, VRWKV6

OPTIONS = {
    'default': {},
    'post_norm': {'post_norm': True},
    'layer_scale': {'init_values': 0.5},
    'post_norm_layer_scale': {'post_norm': True, 'init_values': 1},
    'key_norm': {'key_norm': True},
    'all_of_large': {'key_norm': True, 'post_norm': True, 'init_values': 1e-5},
    'no_shift': {'shift_pixel': 0},
    'shift_two': {'shift_pixel': 2},
    'no_final_norm': {'final_norm': False},
    'wide_hidden': {'hidden_rate': 2.5},
    'drop_rates_in_eval': {'drop_rate': 0.5, 'drop_path_rate': 0.5},
    'one_layer': {'depth': 1},
}
CASES = [(version, name, options) for version in BOTH for name, options in OPTIONS.items()]
CASES += [
    (VRWKV, 'channel_gamma', {'channel_gamma': 0.1}),
    (VRWKV, 'gamma_zero', {'channel_gamma': 0.0}),
    (VRWKV, 'odd_channels', {'embed_dims': 45}),
    (VRWKV6, 'cls_token', {'with_cls_token': True}),
    (VRWKV6, 'output_cls_token', {'with_cls_token': True, 'output_cls_token': True}),
]


def plain_of(model, version, options):
    state = {name: value.detach() for name, value in model.named_parameters()}
    grid = (6, 5)
    return Plain(
        state,
        4,
        grid,
        post_norm=options.get('post_norm', False),
        pixels=options.get('shift_pixel', 1),
        gamma=options.get('channel_gamma', 0.25),
        heads=2 if version is VRWKV6 else None,
    )


@pytest.mark.parametrize(
    ('version', 'options'), [c[::2] for c in CASES], ids=[f'{c[0].__name__}-{c[1]}' for c in CASES]
)
@pytest.mark.parametrize(('height', 'width'), [(24, 20), (13, 34), (3, 1)])
def test_option_against_plain_model(version, options, height, width):
    depth = options.get('depth', 3)
    model = make(version, out_indices=range(depth), **options).double().eval()
    x = images(height, width, dtype=torch.float64)
    tokens, (h, w) = plain_of(model, version, options)(x)
    outputs = model(x)
    assert isinstance(outputs, tuple) and len(outputs) == depth
    for got, want in zip(outputs, tokens, strict=True):
        if options.get('output_cls_token'):
            got, token = got
            torch.testing.assert_close(token, want[:, -1], rtol=1e-9, atol=1e-9)
        want = want[:, : h * w].transpose(1, 2).unflatten(2, (h, w))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('version', BOTH)
def test_batch_items_do_not_see_each_other(version):
    model, x = make(version).eval(), images(batch=3)
    torch.testing.assert_close(model(x)[0][1:2], model(x[1:2])[0], rtol=1e-4, atol=1e-5)
    assert model(x[:0])[0].shape == (0, model.embed_dims, 6, 5)


@pytest.mark.parametrize('version', BOTH)
@pytest.mark.parametrize('channels', [1, 4])
def test_in_channels_and_square_img_size(version, channels):
    model = make(version, in_channels=channels, img_size=16)
    assert model.pos_embed.shape[1] == 16
    assert model(images(16, 16, channels=channels))[0].shape == (2, model.embed_dims, 4, 4)


def test_img_size_need_not_be_a_multiple_of_the_patch():
    model = make(VRWKV, img_size=(21, 18))
    assert model.pos_embed.shape[1] == 6 * 5
    assert torch.equal(model(images(21, 18))[0], model(F.pad(images(21, 18), (0, 2, 0, 3)))[0])


@pytest.mark.parametrize('mode', ['bicubic', 'bilinear', 'nearest'])
def test_interpolate_mode(mode):
    model = make(VRWKV, interpolate_mode=mode)
    with torch.no_grad():  # so that an image of zeros leaves the position embedding alone
        model.patch_embed.projection.bias.zero_()
    got, hw = model.embed(torch.zeros(1, 3, 40, 12))
    want = F.interpolate(model.pos_embed.transpose(1, 2).reshape(1, -1, 6, 5), size=(10, 3), mode=mode)
    assert hw == (10, 3)
    torch.testing.assert_close(got, want.flatten(2).transpose(1, 2))


@pytest.mark.parametrize('version', BOTH)
@pytest.mark.parametrize(
    ('out_indices', 'layers'), [(-1, [2]), (0, [0]), ([0, -1], [0, 2]), ((1,), [1]), ([-1, 1, -3], [0, 1, 2])]
)
def test_out_indices(version, out_indices, layers):
    before = copy.deepcopy(out_indices)
    model = make(version, out_indices=out_indices)
    assert out_indices == before
    every = make(version, out_indices=range(3))(images())
    outputs = model(images())
    assert len(outputs) == len(layers)
    for got, layer in zip(outputs, layers, strict=True):
        assert torch.equal(got, every[layer])


@pytest.mark.parametrize('version', BOTH)
def test_final_norm_touches_the_last_map_alone(version):
    with_norm = make(version, out_indices=range(3))(images())
    model = make(version, out_indices=range(3), final_norm=False)
    without = model(images())
    assert torch.equal(with_norm[0], without[0]) and torch.equal(with_norm[1], without[1])
    assert not torch.equal(with_norm[2], without[2])
    assert 'ln1.weight' not in model.state_dict()


@pytest.mark.parametrize('version', BOTH)
def test_no_shift_leaves_no_mixes(version):
    names = make(version, shift_pixel=0).state_dict()
    assert not [name for name in names if '_mix_' in name or '_maa_' in name]


@pytest.mark.parametrize('version', BOTH)
@pytest.mark.parametrize('options', [{}, OPTIONS['all_of_large'], {'shift_pixel': 0}])
def test_every_parameter_gets_a_gradient(version, options):
    model = make(version, **options)
    golden.gradient_loss(model(images())[0]).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize('version', BOTH)
def test_drop_path_rises_linearly(version):
    model = make(version, drop_path_rate=0.4)
    assert [layer.drop_path.drop_prob for layer in model.layers] == pytest.approx([0, 0.2, 0.4])


def test_drop_path_drops_whole_branches():
    model = make(VRWKV, depth=2, drop_path_rate=0.5, final_norm=False, out_indices=(0, 1)).train()
    before, after = model(images(batch=32))
    delta = (after - before).detach()
    att, ffn = (model.layers[1].att, model.layers[1].ffn)
    tokens = before.detach().flatten(2).transpose(1, 2)
    scaled_att = 2 * att(model.layers[1].ln1(tokens), (6, 5))  # kept branches count 1 / (1 - rate)
    only_att = scaled_att.transpose(1, 2).unflatten(2, (6, 5))
    only_ffn = 2 * ffn(model.layers[1].ln2(tokens), (6, 5)).transpose(1, 2).unflatten(2, (6, 5))
    dropped = [not d.any() for d in delta]
    kept_att = [torch.allclose(d, a, atol=1e-4) for d, a in zip(delta, only_att, strict=True)]
    kept_ffn = [torch.allclose(d, f, atol=1e-4) for d, f in zip(delta, only_ffn, strict=True)]
    assert sum(dropped) > 0 and sum(kept_att) > 0 and sum(kept_ffn) > 0
    assert sum(dropped) + sum(kept_att) + sum(kept_ffn) < 32  # and some keep both


def test_dropout_follows_the_position_embedding():
    model = make(VRWKV, drop_rate=0.5)
    tokens, whole = model.train().embed(images())[0], model.eval().embed(images())[0]
    kept = tokens != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(tokens[kept], 2 * whole[kept])


@pytest.mark.parametrize('version', BOTH)
def test_copies_and_pickles(version):
    model, x = make(version, key_norm=True, init_values=1), images()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x)[0], model(x)[0])


@pytest.mark.parametrize('version', BOTH)
def test_layers_can_be_run_from_outside(version):
    model = make(version, final_norm=False)
    x, hw = model.embed(images())
    for layer in model.layers:
        x = layer(x, hw)
    assert torch.equal(x.transpose(1, 2).unflatten(2, hw), model(images())[0])


def test_layers_past_the_last_map_are_not_run():
    model, calls = make(VRWKV, out_indices=(0, 1)), []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    model(images())
    assert len(calls) == 2


class Extended(torch.nn.Linear):
    """A layer that does more than its weight says, as those of parameter-efficient fine-tuning do."""

    def forward(self, x):
        return super().forward(x).abs()


@pytest.mark.parametrize('version', BOTH)
def test_layers_can_be_replaced_and_hooked(version):
    model = make(version).eval()
    with torch.no_grad():
        before = model(images())[0]
        seen = []
        names = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        hooks = [
            model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name)) for name in names
        ]
        torch.testing.assert_close(model(images())[0], before, rtol=1e-4, atol=1e-5)
        assert set(seen) == set(names)
        for hook in hooks:
            hook.remove()
        for name in names:
            layer = model.get_submodule(name)
            layer.__class__ = Extended
            assert not torch.allclose(model(images())[0], before, rtol=1e-4, atol=1e-5), name
            layer.__class__ = torch.nn.Linear
        assert torch.equal(model(images())[0], before)


@pytest.mark.parametrize('version', BOTH)
@pytest.mark.parametrize('frozen', [-1, 0, 2, 3])
def test_frozen_stages(version, frozen):
    extra = {'with_cls_token': True} if version is VRWKV6 else {}
    model = make(version, frozen_stages=frozen, drop_path_rate=0.5, drop_rate=0.1, **extra).train()
    scale = torch.ones((), requires_grad=True)  # something to train where everything else is frozen
    (scale * model(images())[0]).sum().backward()
    for name, parameter in model.named_parameters():
        layer = int(name.split('.')[1]) if name.startswith('layers.') else 2 if name.startswith('ln1.') else -1
        trains = layer >= frozen
        assert parameter.requires_grad == trains == (parameter.grad is not None), name
    assert [layer.training for layer in model.layers] == [i >= frozen for i in range(3)]
    assert model.drop_after_pos.training == (frozen < 0)
    assert not any(part.training for part in model.eval().modules())
    with pytest.raises(ValueError, match='frozen_stages must be at most the depth, 3, got 4'):
        make(version, frozen_stages=4)
