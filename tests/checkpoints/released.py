"""Files as they were released, fabricated from the tensor names and shapes of the released models."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

BACKBONES = json.loads((Path(__file__).parents[1] / 'golden/state_dicts.json').read_text())


def cheap(*shape: int) -> Tensor:
    """A tensor that takes no room in a file: one zero, expanded."""
    return torch.zeros(()).expand(shape)


def linear(name: str, outputs: int, inputs: int, *kernel: int) -> dict[str, tuple[int, ...]]:
    return {f'{name}.weight': (outputs, inputs, *kernel), f'{name}.bias': (outputs,)}


def conv_bn(name: str, outputs: int, inputs: int, kernel: int) -> dict[str, tuple[int, ...]]:
    norm = {f'{name}.bn.{item}': (outputs,) for item in ('weight', 'bias', 'running_mean', 'running_var')}
    return {f'{name}.conv.weight': (outputs, inputs, kernel, kernel), **norm, f'{name}.bn.num_batches_tracked': ()}


def mask_rcnn(dims: int, classes: int = 80) -> dict[str, tuple[int, ...]]:
    """What MMDetection 2.28 puts around a backbone of ``dims`` channels in `mask_rcnn_r50_fpn`."""
    shapes = {}
    for i in range(4):
        shapes |= linear(f'neck.lateral_convs.{i}.conv', 256, dims, 1, 1)
        shapes |= linear(f'neck.fpn_convs.{i}.conv', 256, 256, 3, 3)
        shapes |= linear(f'roi_head.mask_head.convs.{i}.conv', 256, 256, 3, 3)
    return {
        **shapes,
        **linear('rpn_head.rpn_conv', 256, 256, 3, 3),
        **linear('rpn_head.rpn_cls', 3, 256, 1, 1),
        **linear('rpn_head.rpn_reg', 12, 256, 1, 1),
        **linear('roi_head.bbox_head.fc_cls', classes + 1, 1024),
        **linear('roi_head.bbox_head.fc_reg', 4 * classes, 1024),
        **linear('roi_head.bbox_head.shared_fcs.0', 1024, 256 * 49),
        **linear('roi_head.bbox_head.shared_fcs.1', 1024, 1024),
        **linear('roi_head.mask_head.upsample', 256, 256, 2, 2),
        **linear('roi_head.mask_head.conv_logits', classes, 256, 1, 1),
    }


def upernet(dims: int, classes: int = 150) -> dict[str, tuple[int, ...]]:
    """What MMSegmentation 0.30 puts around a backbone of ``dims`` channels in `upernet_r50`."""
    shapes = {}
    for i in range(4):
        shapes |= conv_bn(f'decode_head.psp_modules.{i}.1', 512, dims, 1)
    for i in range(3):
        shapes |= conv_bn(f'decode_head.lateral_convs.{i}', 512, dims, 1)
        shapes |= conv_bn(f'decode_head.fpn_convs.{i}', 512, 512, 3)
    return {
        **shapes,
        **conv_bn('decode_head.bottleneck', 512, dims + 4 * 512, 3),
        **conv_bn('decode_head.fpn_bottleneck', 512, 4 * 512, 3),
        **linear('decode_head.conv_seg', classes, 512, 1, 1),
        **conv_bn('auxiliary_head.convs.0', 256, dims, 3),
        **linear('auxiliary_head.conv_seg', classes, 256, 1, 1),
    }


HEADS = {
    'vrwkv_t': linear('head.fc', 1000, 192),
    'vrwkv6_t': linear('head.fc', 1000, 192),
    'vrwkv_l_384': linear('head.0', 3072, 1024) | linear('head.2', 1000, 3072),
    'vrwkv_l_192': linear('head.0', 3072, 1024) | linear('head.2', 21841, 3072),
    'adapter_t_det': mask_rcnn(192),
    'adapter_t_seg': upernet(192),
    'adapter_l_det': mask_rcnn(1024),
    'adapter_l_seg': upernet(1024),
}


def shapes_of(model: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a released file: `backbone.*`, and the rest under the names of its time."""
    backbone = BACKBONES['vrwkv_l_384' if model == 'vrwkv_l_192' else model.removesuffix('_det').removesuffix('_seg')]
    return {f'backbone.{name}': tuple(shape) for name, shape in backbone.items()} | HEADS[model]


def tensors_of(model: str) -> dict[str, Tensor]:
    return {name: cheap(*shape) for name, shape in shapes_of(model).items()}


def shell(shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """A module with parameters of these names and shapes, all ones, and next to no memory behind them."""
    root = nn.Module()
    for name, shape in shapes.items():
        module, (*path, last) = root, name.split('.')
        for item in path:
            if item not in dict(module.named_children()):
                module.add_module(item, nn.Module())
            module = module.get_submodule(item)
        module.register_parameter(last, nn.Parameter(torch.ones(()).expand(shape), requires_grad=False))
    return root


def ours(model: str) -> nn.Module:
    """A shell of our model for that file: as OpenMMLab of today names its tensors."""
    names = {'head.0.': 'head.layers.pre_logits.', 'head.2.': 'head.layers.head.'}
    return shell({names.get(n[:7], n[:7]) + n[7:]: shape for n, shape in shapes_of(model).items()})
