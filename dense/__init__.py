"""What detection and segmentation have in common, on MMEngine and mmcv alone; each registers it with its toolbox."""

from dense.backbones import VRWKV6Adapter, VRWKVAdapter

__all__ = ['VRWKV6Adapter', 'VRWKVAdapter']
