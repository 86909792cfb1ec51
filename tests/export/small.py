"""Small models of every kind and the largest difference of a file from them."""

import golden
import torch

from vision_rwkv.backbones import VRWKV, VRWKV6, VRWKVAdapter


class Last(torch.nn.Module):
    """A backbone, but for its last map alone."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images):
        return self.backbone(images)[-1]


def make(kind, **arguments):
    """A small backbone with the golden recipe's weights."""
    options = {
        'vrwkv': (VRWKV, {'embed_dims': 24, 'img_size': 64, 'depth': 1, 'patch_size': 8}),
        'vrwkv6': (VRWKV6, {'embed_dims': 64, 'num_heads': 1, 'img_size': 64, 'depth': 1, 'patch_size': 8}),
        'adapter': (
            VRWKVAdapter,
            {'embed_dims': 16, 'img_size': 64, 'depth': 4, 'conv_inplane': 8, 'deform_num_heads': 2},
        ),
    }
    version, sizes = options[kind]
    model = Last(version(**{**sizes, **arguments})).eval()
    golden.fill(model)
    return model


@torch.no_grad()
def worst(model, function, sizes):
    """The largest difference over sizes and batches, relative to the largest number of the model's output."""
    differences = []
    for height, width in sizes:
        for batch in (1, 3):
            torch.manual_seed(height)
            images = torch.randn(batch, 3, height, width)
            expected, got = model(images), function(images)
            assert got.shape == expected.shape
            differences.append((got - expected).abs().max() / expected.abs().max())
    return max(differences).item()
