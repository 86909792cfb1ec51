"""The patch embedding beside the convolution whose parameters it has."""

import pytest
import torch
import torch.nn.functional as F

from vision_rwkv.backbones.blocks import PatchEmbed


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(('height', 'width'), [(8, 12), (7, 9), (1, 4)])
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_equals_the_convolution(dtype, height, width, layout):
    torch.manual_seed(0)
    embed = PatchEmbed(3, 10, 4).double()
    image = torch.randn(2, 3, height, width, dtype=torch.float64).to(memory_format=layout)
    want = embed.projection(F.pad(image, (0, -width % 4, 0, -height % 4))).flatten(2).transpose(1, 2)
    if dtype == torch.float64:
        tokens, hw = embed(image)
    else:
        with torch.autocast('cpu', dtype):
            tokens, hw = embed.float()(image.float())
    assert tokens.dtype == dtype and hw == (-(-height // 4), -(-width // 4))
    limit = 1e-12 if dtype == torch.float64 else 2**-7
    assert (tokens - want).norm() < limit * want.norm()
