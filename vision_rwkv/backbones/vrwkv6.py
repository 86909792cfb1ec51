"""VRWKV6: the backbone of arXiv 2403.02308 with the data-dependent decay and mixing of RWKV-6, as released."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vision_rwkv.backbones._checks import check_choice, check_int
from vision_rwkv.backbones.base import Backbone
from vision_rwkv.backbones.initial import depth_ratios, full_ramp, parameter, ramp, zigzag
from vision_rwkv.backbones.shift import PlainParts, Shift, apply_norm, is_plain, is_watched
from vision_rwkv.ops import Norm, dynamic_linear, gated_wkv6, log_decay, norm_gate, q_shift, wkv6

HEAD_SIZE = 64
MIX_RANK = 32  # of each of the five data-dependent mixes
DECAY_RANK = 64


def _small(*shape: int) -> nn.Parameter:
    """A low-rank factor: so small that its mix or decay starts as good as constant."""
    return nn.Parameter(torch.empty(shape).uniform_(-1e-4, 1e-4))


class HeadNorm(nn.GroupNorm):
    """A group norm of each token's heads, times silu(gate)."""

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """y, gate (B, T, C) -> (B, T, C) in the dtype of gate."""
        return norm_gate(y, gate, self.weight, self.bias, self.num_groups, self.eps)


class SpatialMix6(nn.Module):
    """The attention half of a VRWKV6 block (released models)."""

    def __init__(self, dim: int, heads: int, layer: int, depth: int, shift: Shift, key_norm: bool):
        super().__init__()
        self.shift = shift
        self.heads = heads
        p, q = depth_ratios(layer, depth)
        if shift.pixels:
            self._make_mixes(dim, p, q)
        self.time_decay = parameter(-6 + 5 * full_ramp(dim, 0.7 + 1.3 * p), 1, 1, dim)
        self.time_decay_w1 = _small(dim, DECAY_RANK)
        self.time_decay_w2 = _small(DECAY_RANK, dim)
        self.time_faaaa = parameter(p * (1 - full_ramp(dim)) + 0.1 * zigzag(dim), heads, HEAD_SIZE)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.key_norm = nn.LayerNorm(dim) if key_norm else None
        self.ln_x = HeadNorm(heads, dim)
        self.output = nn.Linear(dim, dim, bias=False)

    def _make_mixes(self, dim: int, p: float, q: float) -> None:
        self.time_maa_x = parameter(1 - ramp(dim, q), 1, 1, dim)
        self.time_maa_w = parameter(1 - ramp(dim, q), 1, 1, dim)
        self.time_maa_k = parameter(1 - ramp(dim, q), 1, 1, dim)
        self.time_maa_v = parameter(1 - (ramp(dim, q) + 0.3 * p), 1, 1, dim)
        self.time_maa_r = parameter(1 - ramp(dim, q / 2), 1, 1, dim)
        self.time_maa_g = parameter(1 - ramp(dim, q / 2), 1, 1, dim)
        self.time_maa_w1 = _small(dim, 5 * MIX_RANK)
        self.time_maa_w2 = _small(5, MIX_RANK, dim)

    def _mixes(self) -> list[Tensor]:
        return [
            self.time_maa_x,
            self.time_maa_w,
            self.time_maa_k,
            self.time_maa_v,
            self.time_maa_r,
            self.time_maa_g,
        ]

    def _ranks(self) -> list[Tensor]:
        return [self.time_maa_w1, self.time_maa_w2, self.time_decay_w1, self.time_decay_w2]

    def _inputs(self, x: Tensor, hw: tuple[int, int], norm: Norm | None) -> list[Tensor]:
        """Keys, values, receptances, gates, and the decays without their base; all (B, T, C)."""
        linears = (self.key, self.value, self.receptance, self.gate)
        if not self.shift.pixels:
            x = apply_norm(norm, x)
            return [*(linear(x) for linear in linears), self._decay(x)]
        if is_plain(*linears):
            maps = [linear.weight for linear in linears]
            return dynamic_linear(x, self._mixes(), self._ranks(), maps, hw, *self.shift, norm=norm)
        norm = None if norm is None else norm.measured(x)
        first, *mixes = (1 - torch.cat(self._mixes())).unbind()
        z = torch.tanh(q_shift(x, [first], hw, *self.shift, norm=norm)[0] @ self.time_maa_w1)
        delta = torch.bmm(z.view(-1, 5, MIX_RANK).transpose(0, 1), self.time_maa_w2).view(5, *x.shape)
        x_w, *others = q_shift(x, mixes, hw, *self.shift, norm=norm, delta=delta).unbind()
        return [*(linear(part) for linear, part in zip(linears, others, strict=True)), self._decay(x_w)]

    def _decay(self, x_w: Tensor) -> Tensor:
        return torch.tanh(x_w @ self.time_decay_w1) @ self.time_decay_w2

    def _wkv6(self, r: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        """wkv6 of the heads: all (B, T, C)."""
        r, k, v, w = (x.unflatten(-1, (self.heads, HEAD_SIZE)) for x in (r, k, v, w))
        if r.dtype != torch.float16:
            return wkv6(r, k, v, w, self.time_faaaa).flatten(2)
        # The sum over the tokens is not bounded, and float16 ends at 65504; the norm that follows takes any size.
        with torch.autocast(r.device.type, enabled=False):
            return wkv6(r.float(), k.float(), v.float(), w, self.time_faaaa).flatten(2)

    def plain_parts(self) -> PlainParts | None:
        """What `forward` computes with, unless something in it is out of the ordinary."""
        linears = (self.key, self.value, self.receptance, self.gate, self.output)
        if self.key_norm is not None or not self.shift.pixels or not is_plain(*linears) or is_watched(self.ln_x):
            return None
        head_norm = (self.ln_x.weight, self.ln_x.bias, self.ln_x.eps)
        others = (self._ranks(), self.time_decay, self.time_faaaa, *head_norm)
        return PlainParts(self._mixes(), [linear.weight for linear in linears], 'vrwkv6_block', others)

    def forward(self, x: Tensor, hw: tuple[int, int], norm: Norm | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C); ``norm``: a layer norm of x to apply first."""
        k, v, r, gate, raw = self._inputs(x, hw, norm)
        if k.is_cuda and not torch.is_grad_enabled() and self.key_norm is None and not is_watched(self.ln_x):
            head_norm = (self.ln_x.weight, self.ln_x.bias, self.ln_x.eps)
            return self.output(gated_wkv6(r, k, v, raw, self.time_decay, self.time_faaaa, gate, *head_norm))
        y = self._wkv6(r, k, v, log_decay(raw, self.time_decay))
        if self.key_norm is not None:
            y = self.key_norm(y.to(self.key_norm.weight.dtype))
        return self.output(self.ln_x(y, gate))


class VRWKV6(Backbone):
    """VRWKV6: images (B, in_channels, H, W) to a tuple of maps (B, embed_dims, H / patch_size, W / patch_size).

    Arguments as VRWKV, but for the following; there is no channel_gamma.

    Args:
        num_heads: heads of 64 channels each: embed_dims is 64 * num_heads. Q-Shift works within each head.
        init_mode: 'fancy' only.
        key_norm: normalise the WKV6 output and the squared keys of the channel mix.
        with_cls_token: append a token, not part of the map, to the patches; it starts at zero.
        output_cls_token: return pairs [map, class token (B, C)] instead of maps.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = -1,
        drop_rate: float = 0.0,
        embed_dims: int = 192,
        num_heads: int = 3,
        depth: int = 12,
        drop_path_rate: float = 0.0,
        shift_pixel: int = 1,
        init_mode: str = 'fancy',
        post_norm: bool = False,
        key_norm: bool = False,
        init_values: float | None = None,
        hidden_rate: float = 4,
        final_norm: bool = True,
        interpolate_mode: str = 'bicubic',
        with_cp: bool = False,
        frozen_stages: int = -1,
        with_cls_token: bool = False,
        output_cls_token: bool = False,
    ):
        check_choice('init_mode', init_mode, ('fancy',))
        check_int('num_heads', num_heads)
        if embed_dims != HEAD_SIZE * num_heads:
            raise ValueError(
                f'embed_dims must be {HEAD_SIZE} * num_heads = {HEAD_SIZE * num_heads} for num_heads={num_heads} '
                f'(the head size is {HEAD_SIZE}), got {embed_dims!r}'
            )
        shift = Shift(shift_pixel, gamma=1 / 4, heads=num_heads)
        super().__init__(
            lambda layer: SpatialMix6(embed_dims, num_heads, layer, depth, shift, key_norm),
            shift,
            img_size=img_size,
            patch_size=patch_size,
            in_channels=in_channels,
            out_indices=out_indices,
            drop_rate=drop_rate,
            embed_dims=embed_dims,
            depth=depth,
            drop_path_rate=drop_path_rate,
            init_mode=init_mode,
            post_norm=post_norm,
            key_norm=key_norm,
            init_values=init_values,
            hidden_rate=hidden_rate,
            final_norm=final_norm,
            interpolate_mode=interpolate_mode,
            with_cp=with_cp,
            frozen_stages=frozen_stages,
            with_cls_token=with_cls_token,
            output_cls_token=output_cls_token,
        )
