"""Multiply-adds counted by hand."""

import pytest
import torch
from torch import nn

from vision_rwkv.backbones import VRWKV, VRWKV6
from vision_rwkv.flops import Cost, measure


class MultiScaleDeformableAttention(nn.Module):
    """Has the name and layers of mmcv's, and cannot run."""

    def __init__(self):
        super().__init__()
        self.sampling_offsets, self.attention_weights = nn.Linear(8, 24), nn.Linear(8, 12)
        self.value_proj, self.output_proj = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, query, value, **_):
        raise AssertionError


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = MultiScaleDeformableAttention()

    def forward(self, x):
        assert self.attn(query=x.new_zeros(1, 5, 8), value=x.new_zeros(1, 7, 8), identity=None).shape == (1, 5, 8)


@pytest.mark.parametrize(
    ('build', 'flops'),
    [
        (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1), 8 * 4 * 6 * 27),
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)), 8 * 12 * (18 + 54)),
        (lambda: nn.ConvTranspose2d(3, 5, 2, 2), 8 * 12 * 3 * 5 * 4),
        (lambda: nn.Sequential(nn.Linear(12, 10), nn.LayerNorm(10)), 24 * (120 + 20)),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.GELU(), nn.GroupNorm(3, 3)), 0),
        (Attending, 5 * 8 * 36 + 7 * 8 * 4 + 5 * 4 * 8),
    ],
)
def test_layers(build, flops):
    model = build()
    params = sum(p.numel() for p in model.parameters())
    assert measure(build, 8, 12) == Cost(params, flops)


def test_backbones():
    tokens, dim = 6, 64
    stem = tokens * dim * 3 * 16
    norms, channel_mix = 4 * 2 * tokens * dim, 9 * tokens * dim**2  # ln0, ln1, ln2 and the final one; 4 + 4 + 1
    arguments = {'img_size': 8, 'patch_size': 4, 'embed_dims': dim, 'depth': 1}
    spatial_mix = 4 * tokens * dim**2 + 29 * tokens * dim
    assert measure(lambda: VRWKV(**arguments), 8, 12).flops == stem + norms + channel_mix + spatial_mix
    low_rank = 2 * 5 * 32 * dim + 2 * 64 * dim
    spatial_mix6 = tokens * (5 * dim**2 + low_rank + (7 * 64 + 17) * dim + 5 * 32 + 64)
    model6 = measure(lambda: VRWKV6(num_heads=1, **arguments), 8, 12)
    assert model6.flops == stem + norms + channel_mix + spatial_mix6
    assert model6.params == sum(p.numel() for p in VRWKV6(num_heads=1, **arguments).parameters())


def test_a_call_of_its_own_kind():
    assert measure(lambda: nn.Linear(2, 3), 4, 4, lambda model, x: model(torch.zeros(5, 2))).flops == 30
