"""Blocks on a sequence in place of a map (masked pre-training): values and gradients of the plain model."""

import pytest
import torch
from models import make
from plain_model import Plain

from vision_rwkv.backbones import VRWKV
from vision_rwkv.backbones.shift import SEQUENCE

OPTIONS = [{}, {'post_norm': True, 'key_norm': True, 'init_values': 0.5}, {'init_values': 0.5, 'shift_pixel': 0}]


class PlainSequence(Plain):
    """Each token is mixed with the one before it, the first one with zeros."""

    def shift(self, x, hw):
        return torch.stack([torch.zeros_like(x[:, 0]), *x[:, :-1].unbind(1)], 1) if self.pixels else x

    def layer(self, i, x):
        """Tokens (B, T, C) -> tokens (B, T, C)."""
        layer = f'layers.{i}'
        x = self.norm_if(f'{layer}.ln0', x)
        x = x + self.branch(x, SEQUENCE, self.att, f'{layer}.att', f'{layer}.ln1', f'{layer}.gamma1')
        return x + self.branch(x, SEQUENCE, self.ffn, f'{layer}.ffn', f'{layer}.ln2', f'{layer}.gamma2')


@pytest.mark.parametrize('options', OPTIONS)
@pytest.mark.parametrize('with_cp', [False, True])
def test_against_the_plain_model(options, with_cp):
    model = make(VRWKV, **options, with_cp=with_cp).double().train()
    state = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    post_norm, pixels = options.get('post_norm', False), options.get('shift_pixel', 1)
    plain = PlainSequence(state, 4, (6, 5), post_norm=post_norm, pixels=pixels)
    x = torch.randn(2, 7, 48, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = ours, theirs
    for i, layer in enumerate(model.layers):
        got, want = layer(got, SEQUENCE), plain.layer(i, want)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)

    weights = torch.randn_like(x)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-9)
    for name, parameter in model.layers.named_parameters(prefix='layers'):
        assert state[name].grad.any(), name
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-7, atol=1e-9)
