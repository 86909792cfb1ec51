"""VRWKV and VRWKV6 (arXiv 2403.02308) as timm models: timm.create_model('vrwkv_tiny_patch16_224', pretrained=True)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from timm.layers.pool1d import global_pool_nlc
from timm.models import adapt_input_conv, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._builder import resolve_pretrained_cfg
from timm.models._features import feature_take_indices as take_indices
from torch import Tensor, nn

from vision_rwkv.backbones import VRWKV, VRWKV6
from vision_rwkv.backbones._checks import check_choice, check_int, check_range
from vision_rwkv.backbones.blocks import Carry
from vision_rwkv.backbones.initial import init_linear
from vision_rwkv.checkpoints import check_finite, download, fit, read, to_our_names

POOLS = ('avg', 'max', 'avgmax', '')
FIRST_CONV = 'backbone.patch_embed.projection'


class Head(nn.Module):
    """A linear classifier of pooled tokens, or one with a hidden layer, under the released models' tensor names."""

    def __init__(self, dim: int, num_classes: int, hidden_dim: int | None, pool: str, drop_rate: float):
        super().__init__()
        self.dim, self.hidden_dim = dim, hidden_dim
        self.drop = nn.Dropout(drop_rate)
        if hidden_dim:
            self.layers = nn.ModuleDict({'pre_logits': nn.Linear(dim, hidden_dim), 'act': nn.Tanh()})
        self.reset(num_classes, pool)

    def reset(self, num_classes: int, pool: str) -> None:
        """A new last layer for ``num_classes``, or none for 0."""
        check_int('num_classes', num_classes, minimum=0)
        check_choice('global_pool', pool, POOLS)
        self.pool = pool
        last = nn.Linear(self.hidden_dim or self.dim, num_classes) if num_classes else nn.Identity()
        init_linear(last)
        if self.hidden_dim:
            self.layers['head'] = last
        else:
            self.fc = last

    @property
    def last(self) -> nn.Module:
        return self.layers['head'] if self.hidden_dim else self.fc

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, T, C) -> logits (B, classes), or what the last layer takes; (B, T, ...) without pooling.

        With neither pooling nor classes, the tokens themselves.
        """
        x = global_pool_nlc(x, self.pool, num_prefix_tokens=0)
        if not self.pool and isinstance(self.last, nn.Identity):
            return x
        if self.hidden_dim:
            x = self.layers['act'](self.layers['pre_logits'](x))
        x = self.drop(x)
        return x if pre_logits else self.last(x)


class VisionRWKV(nn.Module):
    """A backbone and a head with the methods of timm's models; images of any size (B, in_chans, H, W).

    Args:
        version: VRWKV or VRWKV6.
        img_size: the grid of the position embedding; a checkpoint's is resized to it.
        in_chans, num_classes, global_pool, drop_rate, drop_path_rate: as in timm; no classes: features, no pooling: ''.
        hidden_dim: of a hidden layer in the head.
        **backbone: further arguments of ``version``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        version: type[VRWKV] | type[VRWKV6],
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        hidden_dim: int | None = None,
        **backbone: Any,
    ):
        super().__init__()
        check_range('drop_rate', drop_rate, 0, 1)
        self.backbone = version(img_size=img_size, in_channels=in_chans, drop_path_rate=drop_path_rate, **backbone)
        dim = self.backbone.embed_dims
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, dim, hidden_dim or dim
        reduction = self.backbone.patch_embed.patch_size
        self.feature_info = [
            {'module': f'backbone.layers.{i}', 'num_chs': dim, 'reduction': reduction}
            for i in range(len(self.backbone.layers))
        ]
        self.head = Head(dim, num_classes, hidden_dim, global_pool, drop_rate)
        self.head.apply(init_linear)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong together, from the image up, for layer-wise decay; one block is one layer."""
        return {
            'stem': r'^backbone\.(?:patch_embed|pos_embed|cls_token)',
            'blocks': r'^backbone\.layers\.(\d+)',
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are recomputed in the backward pass."""
        layers: Any = self.backbone.layers
        for layer in layers:
            layer.with_cp = enable

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head.last

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for ``num_classes``, or none for 0; another pooling if given."""
        self.head.reset(num_classes, self.head.pool if global_pool is None else global_pool)
        self.num_classes = num_classes

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """As timm's: the outputs of the layers ``indices`` (an int: the last so many), and of the whole backbone.

        There are no prefix tokens.
        """
        check_choice('output_fmt', output_fmt, ('NCHW', 'NLC'))
        wanted, last = take_indices(len(self.backbone.layers), indices)
        final_norm = self.backbone.ln1 or nn.Identity()
        intermediates, carry = [], Carry()
        x, hw = self.backbone.embed(x)
        for i, layer in enumerate(self.backbone.layers):
            if stop_early and i > last:
                break
            x = layer(x, hw, carry)
            if i in wanted:
                y = final_norm(x) if norm else x
                intermediates.append(y if output_fmt == 'NLC' else y.transpose(1, 2).unflatten(2, hw).contiguous())
        if output_dict:
            features = {} if intermediates_only else {'image_features': final_norm(x)}
            return {'image_intermediates': intermediates, **features}
        return intermediates if intermediates_only else (final_norm(x), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the outputs of the layers ``indices`` do not need; returns their numbers."""
        wanted, last = take_indices(len(self.backbone.layers), indices)
        self.backbone.layers = self.backbone.layers[: last + 1]
        if prune_norm:
            self.backbone.ln1 = None
        if prune_head:
            self.reset_classifier(0, '')
        return wanted

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] | tuple[int, ...] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Tensor]:
        """The outputs of the last ``n`` layers, or of the layers ``n``: tokens (B, T, C), or maps (B, C, h, w)."""
        output_fmt = 'NCHW' if reshape else 'NLC'
        indices = n if isinstance(n, int) else list(n)
        return self.forward_intermediates(x, indices, norm=norm, output_fmt=output_fmt, intermediates_only=True)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> normalised tokens (B, T, C)."""
        return self.forward_intermediates(x, 1)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, T, C) -> logits (B, classes), or with ``pre_logits`` what the last layer takes."""
        return self.head(x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> logits (B, classes)."""
        return self.forward_head(self.forward_features(x))

    def load_pretrained(self, path: str | Path) -> None:
        """Load a checkpoint file of any released layout, strictly; see `fit_pretrained`."""
        self.load_state_dict(fit_pretrained(read(path), self), strict=False)


def fit_pretrained(contents: Mapping[str, Any], model: VisionRWKV) -> dict[str, Tensor]:
    """The tensors of a checkpoint for ``model``: all of them, but for a head with another number of classes.

    The first convolution is adapted to the channels, as timm does. Raises CheckpointError.
    """
    tensors = to_our_names(contents)
    first, channels = f'{FIRST_CONV}.weight', model.backbone.in_channels
    if first in tensors and tensors[first].shape[1] != channels:
        tensors[first] = adapt_input_conv(channels, tensors[first])
    source_classes = model.pretrained_cfg['num_classes']  # type: ignore[index]  # timm sets it
    fitted = fit(tensors, model, start=model.num_classes != source_classes).tensors
    check_finite(fitted)
    return fitted


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    cfg = resolve_pretrained_cfg(
        variant, kwargs.pop('pretrained_cfg', None), kwargs.pop('pretrained_cfg_overlay', None)
    )
    if pretrained and cfg.url and not (cfg.file or cfg.state_dict or cfg.hf_hub_id):
        cfg = replace(cfg, file=str(download(str(cfg.url), kwargs.get('cache_dir'))))
    return build_model_with_cfg(
        VisionRWKV,
        variant,
        pretrained,
        pretrained_cfg=asdict(replace(cfg, custom_load=bool(cfg.file))),
        pretrained_filter_fn=fit_pretrained,
        feature_cfg={'out_indices': 3, 'feature_cls': 'getter'},
        **kwargs,
    )


def _cfg(file: str, size: int = 224, crop_pct: float = 0.875, classifier: str = 'head.fc') -> dict[str, Any]:
    return {
        'url': f'https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/{file}',
        'input_size': (3, size, size),
        'crop_pct': crop_pct,
        'first_conv': FIRST_CONV,
        'classifier': classifier,
        'paper_ids': 'arXiv:2403.02308',
    }


default_cfgs = generate_default_cfgs(
    {
        'vrwkv_tiny_patch16_224': _cfg('vrwkv_t_in1k_224.pth'),
        'vrwkv_small_patch16_224': _cfg('vrwkv_s_in1k_224.pth'),
        'vrwkv_base_patch16_224': _cfg('vrwkv_b_in1k_224.pth'),
        'vrwkv_large_patch16_384': _cfg('vrwkv_l_22kto1k_384.pth', 384, 1.0, 'head.layers.head'),
        'vrwkv6_tiny_patch16_224': _cfg('vrwkv6_t_in1k_224.pth'),
        'vrwkv6_small_patch16_224': _cfg('vrwkv6_s_in1k_224.pth'),
        'vrwkv6_base_patch16_224': _cfg('vrwkv6_b_in1k_224.pth'),
    }
)

POST_NORM = {'post_norm': True, 'init_values': 1e-5}


@register_model
def vrwkv_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VRWKV-T, 6.2M parameters."""
    args = {'version': VRWKV, 'embed_dims': 192, **kwargs}
    return _create('vrwkv_tiny_patch16_224', pretrained, **args)


@register_model
def vrwkv_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VRWKV-S, 23.8M parameters."""
    args = {'version': VRWKV, 'embed_dims': 384, **POST_NORM, 'init_values': 1, **kwargs}
    return _create('vrwkv_small_patch16_224', pretrained, **args)


@register_model
def vrwkv_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VRWKV-B, 93.7M parameters."""
    args = {'version': VRWKV, 'embed_dims': 768, **POST_NORM, **kwargs}
    return _create('vrwkv_base_patch16_224', pretrained, **args)


@register_model
def vrwkv_large_patch16_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VRWKV-L, 334.9M parameters; its position embedding is that of 192 pixels."""
    args = {'version': VRWKV, 'img_size': 192, 'embed_dims': 1024, 'depth': 24, 'key_norm': True, 'hidden_dim': 3072}
    return _create('vrwkv_large_patch16_384', pretrained, **args | POST_NORM | kwargs)


@register_model
def vrwkv6_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VRWKV6-T, 7.6M parameters."""
    args = {'version': VRWKV6, 'embed_dims': 192, 'num_heads': 3, **kwargs}
    return _create('vrwkv6_tiny_patch16_224', pretrained, **args)


@register_model
def vrwkv6_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VRWKV6-S, 27.7M parameters."""
    args = {'version': VRWKV6, 'embed_dims': 384, 'num_heads': 6, **POST_NORM, **kwargs}
    return _create('vrwkv6_small_patch16_224', pretrained, **args)


@register_model
def vrwkv6_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VRWKV6-B, 104.9M parameters."""
    args = {'version': VRWKV6, 'embed_dims': 768, 'num_heads': 12, **POST_NORM, **kwargs}
    return _create('vrwkv6_base_patch16_224', pretrained, **args)
