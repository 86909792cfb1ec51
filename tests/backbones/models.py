"""Small models of both versions, filled with the golden recipe's weights."""

from pathlib import Path

import golden
import torch

from vision_rwkv.backbones import VRWKV, VRWKV6

GOLDEN = Path(golden.__file__).parent


def make(version, **arguments):
    """VRWKV (48 channels) or VRWKV6 (128): 3 layers, patches of 4, a 6 x 5 grid."""
    dims = {'embed_dims': 48} if version is VRWKV else {'embed_dims': 128, 'num_heads': 2}
    model = version(**{'img_size': (24, 20), 'patch_size': 4, 'depth': 3, **dims, **arguments})
    golden.fill(model)
    return model


def images(height=24, width=20, batch=2, channels=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randn(batch, channels, height, width, generator=generator).to(dtype)


BOTH = (VRWKV, VRWKV6)
