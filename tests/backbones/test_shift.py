"""Q-Shift and mixing: a picture worked out by hand, and a loop over tokens for everything else."""

import pytest
import torch
from plain_model import shift_loops

from vision_rwkv.backbones.shift import SEQUENCE, Shift, q_shift, shift_and_mix


def test_by_hand():
    # A 2 x 3 map of 4 channels; token number t holds t + 1 everywhere:   1 2 3
    #                                                                     4 5 6
    x = torch.arange(1.0, 7).view(1, 6, 1).expand(1, 6, 4)
    y = q_shift(x, (2, 3), Shift(1, 0.25, 1))
    assert y[0, :, 0].tolist() == [0, 1, 2, 0, 4, 5]  # from the left
    assert y[0, :, 1].tolist() == [2, 3, 0, 5, 6, 0]  # from the right
    assert y[0, :, 2].tolist() == [0, 0, 0, 1, 2, 3]  # from above
    assert y[0, :, 3].tolist() == [4, 5, 6, 0, 0, 0]  # from below


def test_a_sequence_by_hand():
    x = torch.arange(1.0, 7).view(1, 6, 1).expand(1, 6, 4)
    assert q_shift(x, SEQUENCE, Shift(1, 0.25, 1))[0].tolist() == [[i] * 4 for i in range(6)]


def test_mix_by_hand():
    x = torch.tensor([[[1.0, 1, 1, 1], [3, 3, 3, 3]]])  # a 1 x 2 map
    first, second = shift_and_mix(x, (1, 2), (torch.ones(1, 1, 4), torch.full((1, 1, 4), 0.25)), Shift(1, 0.25, 1))
    assert torch.equal(first, x)  # 1: the token alone
    # 0.25 of the token and 0.75 of its left, right, upper, lower neighbour
    assert second.tolist() == [[[0.25, 0.25 + 2.25, 0.25, 0.25], [0.75 + 0.75, 0.75, 0.75, 0.75]]]


def test_no_shift_no_mix():
    x = torch.randn(2, 6, 8)
    mixed = shift_and_mix(x, (2, 3), (None, None), Shift(0, 0.25, 1))
    assert len(mixed) == 2 and all(torch.equal(y, x) for y in mixed)


@pytest.mark.parametrize('hw', [(1, 1), (1, 7), (5, 1), (3, 4)])
@pytest.mark.parametrize('pixels', [1, 2, 9])  # 9: beyond every border
@pytest.mark.parametrize(
    ('gamma', 'heads', 'channels'), [(0.25, 1, 8), (0.25, 1, 7), (0.1, 1, 24), (0, 1, 8), (0.25, 3, 24)]
)
@pytest.mark.parametrize('others', [0, 1])  # a class token
def test_against_loops(hw, pixels, gamma, heads, channels, others):
    x = torch.randn(2, hw[0] * hw[1] + others, channels, dtype=torch.float64, requires_grad=True)
    y, want = q_shift(x, hw, Shift(pixels, gamma, heads)), shift_loops(x, hw, pixels, gamma, heads)
    assert torch.equal(y, want)
    assert torch.equal(y[:, hw[0] * hw[1] :], x[:, hw[0] * hw[1] :])
    weights = torch.randn_like(y)
    gradients = [torch.autograd.grad((z * weights).sum(), x)[0] for z in (y, want)]
    assert torch.equal(*gradients)


def test_any_strides():
    x = torch.randn(8, 12, 2).permute(2, 1, 0)
    shift = Shift(1, 0.25, 1)
    assert torch.equal(q_shift(x, (3, 4), shift), q_shift(x.contiguous(), (3, 4), shift))
