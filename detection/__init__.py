"""Object detection: Vision-RWKV in MMDetection. Importing this registers what the configs name."""

from mmdet.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, TRANSFORMS

from dense import VRWKV6Adapter, VRWKVAdapter
from openmmlab import LayerDecayConstructor, LoadImageFromFile

from .datasets import CocoDataset

__all__ = ['CocoDataset']

MODELS.register_module('VRWKV_Adapter', module=VRWKVAdapter)
MODELS.register_module('VRWKV6_Adapter', module=VRWKV6Adapter)
OPTIM_WRAPPER_CONSTRUCTORS.register_module(module=LayerDecayConstructor)
TRANSFORMS.register_module(module=LoadImageFromFile)  # found before mmcv's of the same name
