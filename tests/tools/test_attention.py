"""The weights drawn are those of the operators' definition, and a token outside the map is refused."""

import numpy as np
import pytest
import torch
import untrained
from PIL import Image

from tools import attention
from tools.cli import UserError
from vision_rwkv.backbones import VRWKV, VRWKV6, VRWKVAdapter
from vision_rwkv.ops import reference

DOUBLE = {'dtype': torch.float64}


def of_gradient(y: torch.Tensor, v: torch.Tensor, token: int) -> torch.Tensor:
    """What each value contributes to the output at ``token``, channel by channel: y is linear in v."""
    (gradient,) = torch.autograd.grad(y[0, token].sum(), v)
    return gradient[0]


@pytest.mark.parametrize('token', [0, 4, 10])
def test_weights_of_bi_wkv(token):
    torch.manual_seed(0)
    w, u, k = torch.randn(5, **DOUBLE), torch.randn(5, **DOUBLE), torch.randn(1, 11, 5, **DOUBLE)
    v = torch.randn(1, 11, 5, **DOUBLE, requires_grad=True)
    expected = of_gradient(reference.bi_wkv(w, u, k, v), v, token)  # (T, C)
    weights = attention.bi_wkv_weights(w, u, k[0], token)
    torch.testing.assert_close(weights, expected.mean(1))
    assert weights.sum() == pytest.approx(1)


@pytest.mark.parametrize('token', [0, 4, 10])
def test_weights_of_wkv6(token):
    torch.manual_seed(0)
    r, k, raw = torch.randn(3, 1, 11, 2, 5, **DOUBLE)
    w, u = -raw.exp(), torch.randn(2, 5, **DOUBLE)
    v = torch.randn(1, 11, 2, 5, **DOUBLE, requires_grad=True)
    scores = of_gradient(reference.wkv6(r, k, v, w, u), v, token)  # (T, H, N), the same in all channels of a head
    assert (scores < 0).any() and torch.allclose(scores, scores[..., :1].expand_as(scores))
    shares = scores[..., 0].abs() / scores[..., 0].abs().sum(0)
    weights = attention.wkv6_weights(r[0], k[0], w[0], u, token)
    torch.testing.assert_close(weights, shares.mean(1))
    assert weights.sum() == pytest.approx(1)


def test_weights_of_wkv6_far_from_each_other():
    """Products of decays that underflow are 0; not a number they never are."""
    torch.manual_seed(0)
    r, k = torch.randn(2, 50, 1, 4, **DOUBLE)
    w = torch.full((50, 1, 4), -300.0, **DOUBLE)
    weights = attention.wkv6_weights(r, k, w, torch.ones(1, 4, **DOUBLE), 25)
    assert weights.isfinite().all() and weights[24:27].sum() == pytest.approx(1)


def model(kind: str):
    """A small backbone whose keys differ, and the layers it has."""
    torch.manual_seed(0)
    size = {'img_size': 64, 'embed_dims': 64, 'depth': 4, 'patch_size': 16}
    made = {
        'vrwkv': lambda: VRWKV(**size, post_norm=True, key_norm=True, init_values=1.0),
        'vrwkv6': lambda: VRWKV6(**size, num_heads=1, with_cls_token=True, output_cls_token=True),
        'adapter': lambda: VRWKVAdapter(**size, deform_num_heads=2, conv_inplane=8),
    }[kind]()
    return made.eval()


@pytest.mark.parametrize('kind', ['vrwkv', 'vrwkv6', 'adapter'])
def test_weights_in_a_model(kind):
    backbone, x = model(kind), torch.randn(1, 3, 48, 90)
    if kind == 'vrwkv6':
        torch.nn.init.normal_(backbone.cls_token)
    given = []
    hooks = [layer.att.key.register_forward_hook(lambda m, i, y: given.append(y.double())) for layer in backbone.layers]
    weights, token = attention.token_weights(backbone, x, (1, 5))
    for hook in hooks:
        hook.remove()
    shape = (4, 4, 6) if kind == 'adapter' else (4, 3, 6)  # the adapter pads to whole strides of 32
    assert weights.shape == shape and token == (1, 5) and weights.dtype == np.float64
    sums = weights.sum((1, 2))
    assert np.all(sums < 1) if kind == 'vrwkv6' else sums == pytest.approx(1)  # a class token has the rest
    if kind != 'vrwkv6':
        for layer, k, drawn in zip(backbone.layers, given, weights, strict=True):
            w, u = (p.detach().double() / k.shape[1] for p in (layer.att.spatial_decay, layer.att.spatial_first))
            v = torch.zeros_like(k, requires_grad=True)
            expected = of_gradient(reference.bi_wkv(w, u, k, v), v, shape[2] + 5).mean(1)
            assert drawn.ravel() == pytest.approx(expected.numpy(), rel=1e-4)
    assert attention.token_weights(backbone, x, None)[1] == (shape[1] // 2, 3)
    for outside in ((shape[1], 0), (0, 6), (-1, 0)):
        with pytest.raises(UserError, match=f'row from 0 to {shape[1] - 1} and a column from 0 to 5, got {outside[0]}'):
            attention.token_weights(backbone, x, outside)


def test_reach():
    weights = np.zeros((5, 5))
    weights[2, 2] = weights[2, 4] = weights[5 - 3 - 2, 2] = 1  # distances 0, 2 and 2
    assert attention.reach(weights, (2, 2)) == pytest.approx(4 / 3)


def test_what_is_drawn():
    picture = np.full((40, 60, 3), 255, np.uint8)  # 3 x 4 patches of 16, the last ones beyond the picture
    weights = np.full((6, 3, 4), 1 / 12)
    weights[:, 0, 0] *= 3
    figure = attention.draw(picture, weights, (1, 2), 16, 'title')
    *panels, bar = (axes for axes in figure.axes if axes.get_visible())
    assert [axes.get_title() for axes in panels] == ['the image', *(f'layer {n}' for n in range(1, 7))]
    for axes in panels:
        (mark,) = axes.patches
        assert (mark.get_xy(), mark.get_width()) == ((31.5, 15.5), 16)
        assert axes.images[0].get_array().shape == (40, 60, 3)
    shaded = panels[1].images[0].get_array()
    assert (shaded[:16, :16] == shaded[0, 0]).all() and (shaded[16:] == shaded[20, 20]).all()
    assert shaded[0, 0, 0] > shaded[0, 0, 2] + 0.3  # more than alike: red


@pytest.mark.parametrize('config', [untrained.CLASSIFICATION, untrained.CLASSIFICATION6, untrained.SEGMENTATION])
def test_command(config, photos, tmp_path, monkeypatch, capsys):
    checkpoint = untrained.write(config, tmp_path / 'model.pth')
    command = (config, checkpoint, photos / 'rocket.png', '--out', tmp_path / 'deep/weights.png')
    untrained.call(attention, monkeypatch, *command)
    said = capsys.readouterr().out.splitlines()
    grid = '4 x 6' if config == untrained.SEGMENTATION else '16 x 24'
    assert any(line.endswith(f' of {grid}') for line in said) and sum(line.strip()[:1] in '1234' for line in said) == 4
    assert np.asarray(Image.open(tmp_path / 'deep/weights.png')).std() > 10
    assert [path.name for path in (tmp_path / 'deep').iterdir()] == ['weights.png']


def test_what_is_refused(photos, tmp_path, monkeypatch):
    config, photo, out = untrained.CLASSIFICATION, photos / 'camera.jpg', ('--out', tmp_path / 'x.png')
    checkpoint = untrained.write(config, tmp_path / 'model.pth')
    (tmp_path / 'text.png').write_text('text')
    masked = untrained.CONFIGS / 'classification/mae/vrwkv_mae_digits.py'
    for arguments, message in (
        ((config, 'no.pth', photo, *out), 'checkpoint not found: no.pth'),
        ((config, checkpoint, 'no.png', *out), 'image no.png: .*No such file'),
        ((config, checkpoint, tmp_path / 'text.png', *out), 'text.png: not an image'),
        ((config, checkpoint, photo, *out, '--device', 'gpu'), '--device expects cpu, cuda or cuda:N, got gpu'),
        ((config, checkpoint, photo, *out, '--token', 16, 0), r'got 16 0'),
        ((config, checkpoint, photo, '--out', 'x.jpg'), r'--out: expected a name that ends in \.png, got x\.jpg'),
        ((masked, checkpoint, photo, *out), 'has no test_dataloader'),
    ):
        with pytest.raises(UserError, match=message):
            untrained.call(attention, monkeypatch, *arguments)
    assert not (tmp_path / 'x.png').exists()


@pytest.mark.cuda
@pytest.mark.parametrize('kind', ['vrwkv', 'vrwkv6'])
def test_on_a_gpu(kind):
    backbone, x = model(kind), torch.randn(1, 3, 48, 90)
    ours, _ = attention.token_weights(backbone, x, (1, 2))
    theirs, _ = attention.token_weights(backbone.cuda(), x.cuda(), (1, 2))
    assert theirs == pytest.approx(ours, rel=1e-2)
