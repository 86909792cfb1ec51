"""Semantic segmentation: Vision-RWKV in MMSegmentation. Importing this registers what the configs name."""

from functools import partial

from mmseg.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, TRANSFORMS

from dense import VRWKV6Adapter, VRWKVAdapter
from openmmlab import LayerDecayConstructor, LoadImageFromFile

from .datasets import ADE20KDataset, BaseSegDataset, LoadAnnotations
from .metrics import DumpSegResults

__all__ = ['ADE20KDataset', 'BaseSegDataset', 'DumpSegResults', 'LoadAnnotations']

# As published, segmentation adds another token map to each output.
MODELS.register_module('VRWKV_Adapter', module=partial(VRWKVAdapter, token_maps='stages'))
MODELS.register_module('VRWKV6_Adapter', module=partial(VRWKV6Adapter, token_maps='stages'))
OPTIM_WRAPPER_CONSTRUCTORS.register_module(module=LayerDecayConstructor)
TRANSFORMS.register_module(module=LoadImageFromFile)  # found before mmcv's of the same name
