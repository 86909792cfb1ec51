"""What people can get wrong: the error names the thing, what was expected and what came."""

import pytest
import torch
from models import BOTH, images, make

from vision_rwkv.backbones import VRWKV, VRWKV6

ARGUMENTS = [
    ({'init_mode': 'fance'}, ValueError, "init_mode must be 'fancy'.*got 'fance'"),
    ({'init_mode': None}, ValueError, "init_mode must be 'fancy'.*got None"),
    ({'out_indices': 3}, ValueError, r'out_indices must be in \[-3, 2\] for a depth of 3, got 3'),
    ({'out_indices': [0, -4]}, ValueError, r'out_indices must be in \[-3, 2\] for a depth of 3, got -4'),
    ({'out_indices': []}, ValueError, r'out_indices must name at least one layer.*got \[\]'),
    ({'out_indices': [2, -1]}, ValueError, r'out_indices must name.*each layer once, got \[2, -1\]'),
    ({'out_indices': 'last'}, TypeError, "out_indices must be an int or a sequence of ints, got 'last'"),
    ({'out_indices': 1.0}, TypeError, 'out_indices must be an int or a sequence of ints, got 1.0'),
    ({'out_indices': None}, TypeError, 'out_indices must be an int or a sequence of ints, got None'),
    ({'img_size': 0}, ValueError, 'img_size must be at least 1, got 0'),
    ({'img_size': (1, 2, 3)}, TypeError, r'img_size must be an int or a pair of ints, got \(1, 2, 3\)'),
    ({'img_size': (24, 2.5)}, TypeError, 'img_size must be an int, got 2.5'),
    ({'img_size': '224'}, TypeError, "img_size must be an int or a pair of ints, got '224'"),
    ({'patch_size': 0}, ValueError, 'patch_size must be at least 1, got 0'),
    ({'patch_size': (4, 4)}, TypeError, r'patch_size must be an int, got \(4, 4\)'),
    ({'in_channels': -3}, ValueError, 'in_channels must be at least 1, got -3'),
    ({'depth': 0}, ValueError, 'depth must be at least 1, got 0'),
    ({'depth': True}, TypeError, 'depth must be an int, got True'),
    ({'shift_pixel': -1}, ValueError, 'shift_pixel must be at least 0, got -1'),
    ({'shift_pixel': 0.5}, TypeError, 'shift_pixel must be an int, got 0.5'),
    ({'drop_rate': 1.0}, ValueError, r'drop_rate must be in \[0, 1\), got 1.0'),
    ({'drop_path_rate': -0.1}, ValueError, r'drop_path_rate must be in \[0, 1\), got -0.1'),
    ({'drop_path_rate': '0.1'}, TypeError, "drop_path_rate must be a number, got '0.1'"),
    ({'hidden_rate': 0}, ValueError, 'hidden_rate must be in .*, got 0'),
    ({'init_values': 'small'}, TypeError, "init_values must be a number, got 'small'"),
    ({'init_values': float('nan')}, ValueError, 'init_values must be in .*, got nan'),
    ({'interpolate_mode': 'cubic'}, ValueError, "interpolate_mode must be 'bicubic' or .*, got 'cubic'"),
]


@pytest.mark.parametrize('version', BOTH)
@pytest.mark.parametrize(('arguments', 'error', 'message'), ARGUMENTS)
def test_argument(version, arguments, error, message):
    with pytest.raises(error, match=message):
        make(version, **arguments)


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        ({'embed_dims': 0}, ValueError, 'embed_dims must be at least 1, got 0'),
        ({'embed_dims': 48.0}, TypeError, 'embed_dims must be an int, got 48.0'),
        ({'channel_gamma': 0.3}, ValueError, r'channel_gamma must be in \[0, 0.25\], got 0.3'),
        ({'channel_gamma': -0.1}, ValueError, r'channel_gamma must be in \[0, 0.25\], got -0.1'),
    ],
)
def test_vrwkv_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        make(VRWKV, **arguments)


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        ({'init_mode': 'local'}, ValueError, "init_mode must be 'fancy', got 'local'"),
        ({'num_heads': 0}, ValueError, 'num_heads must be at least 1, got 0'),
        ({'embed_dims': 130}, ValueError, r'embed_dims must be 64 \* num_heads = 128 for num_heads=2.*64\), got 130'),
        ({'embed_dims': 128, 'num_heads': 4}, ValueError, r'embed_dims must be .* 256 for num_heads=4.*, got 128'),
        ({'output_cls_token': True}, ValueError, 'output_cls_token=True needs with_cls_token=True, got .*False'),
    ],
)
def test_vrwkv6_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        make(VRWKV6, **arguments)


@pytest.mark.parametrize('version', BOTH)
@pytest.mark.parametrize(
    ('x', 'error', 'message'),
    [
        (images()[0], ValueError, r'the image batch must have shape \(B, 3, H, W\), got \(3, 24, 20\)'),
        (images(channels=4), ValueError, r'the image batch must have shape \(B, 3, H, W\), got \(2, 4, 24, 20\)'),
        (images()[..., :0], ValueError, r'the image batch must have shape \(B, 3, H, W\), got \(2, 3, 24, 0\)'),
        (images().to(torch.uint8), TypeError, 'the image batch must have a floating-point dtype, got torch.uint8'),
        (images().numpy(), TypeError, 'the image batch must be a torch.Tensor, got ndarray'),
    ],
)
def test_image(version, x, error, message):
    with pytest.raises(error, match=message):
        make(version)(x)
