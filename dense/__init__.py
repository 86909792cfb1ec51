"""What detection and segmentation have in common, on MMEngine and mmcv alone; each registers it with its toolbox."""

from dense.backbones import VRWKV6Adapter, VRWKVAdapter
from dense.loading import LoadImageFromFile

__all__ = ['LoadImageFromFile', 'VRWKV6Adapter', 'VRWKVAdapter']
