"""The timm models and the MMPretrain models: the same weights and image, the same logits."""

import numpy as np
import pytest
import timm
import torch
from mmengine.dataset import Compose, default_collate
from mmpretrain.registry import MODELS, TRANSFORMS
from PIL import Image
from published import load

import vision_rwkv  # noqa: F401

PAIRS = {
    'vrwkv/vrwkv_tiny_8xb128_in1k': 'vrwkv_tiny_patch16_224',
    'vrwkv/vrwkv_small_8xb128_in1k': 'vrwkv_small_patch16_224',
    'vrwkv/vrwkv_base_16xb64_in1k': 'vrwkv_base_patch16_224',
    'vrwkv/vrwkv_l_22kto1k_384': 'vrwkv_large_patch16_384',
    'vrwkv6/vrwkv6_tiny_8xb128_in1k': 'vrwkv6_tiny_patch16_224',
    'vrwkv6/vrwkv6_small_8xb128_in1k': 'vrwkv6_small_patch16_224',
    'vrwkv6/vrwkv6_base_16xb64_in1k': 'vrwkv6_base_patch16_224',
}


@pytest.mark.parametrize('size', [(300, 400), (500, 375), (1024, 768)])
@pytest.mark.parametrize('name', ['vrwkv/vrwkv_tiny_8xb128_in1k', 'vrwkv/vrwkv_l_22kto1k_384'])
def test_preprocessing(name, size, tmp_path):
    ours, theirs = preprocess(name, size, tmp_path)
    # Resized to whole grey levels in either path; in between one may round up and the other down.
    assert (ours - theirs).abs().max() < 1e-5


def preprocess(name, size, folder):
    """What each path makes of one picture: (1, 3, H, W) both."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    small.resize(size, Image.Resampling.BICUBIC).save(folder / 'image.png')
    cfg = load(name).cfg
    pipeline = Compose([TRANSFORMS.build(step) for step in cfg.test_dataloader.dataset.pipeline])
    preprocessor = MODELS.build({'type': 'ClsDataPreprocessor', **cfg.data_preprocessor})
    batch = default_collate([pipeline({'img_path': str(folder / 'image.png'), 'gt_label': 0})])
    ours = preprocessor(batch)['inputs']
    data = timm.data.resolve_data_config(timm.get_pretrained_cfg(PAIRS[name]).to_dict())
    transform = timm.data.create_transform(**data)
    return ours, transform(Image.open(folder / 'image.png').convert('RGB'))[None]


@pytest.mark.parametrize('name', PAIRS)
def test_models(name):
    cfg = load(name).cfg
    with torch.device('meta'):
        ours, theirs = MODELS.build(cfg.model), timm.create_model(PAIRS[name])
    assert [(n, t.shape) for n, t in ours.state_dict().items()] == [
        (n, t.shape) for n, t in theirs.state_dict().items()
    ]
    assert all(a.post_norm == b.post_norm for a, b in zip(ours.backbone.layers, theirs.backbone.layers, strict=True))


@pytest.mark.parametrize('name', [name for name in PAIRS if 'base' not in name])
def test_logits(name, tmp_path):
    cfg = load(name).cfg
    cfg.model.backbone.depth = 1
    model = MODELS.build({**cfg.model, 'data_preprocessor': cfg.data_preprocessor}).eval()
    model.init_weights()
    for parameter in model.parameters():  # gammas and position embedding too
        torch.nn.init.normal_(parameter, std=0.1)
    other = timm.create_model(PAIRS[name], depth=1).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    ours, theirs = preprocess(name, (300, 400), tmp_path)
    with torch.no_grad():
        expected, found = model(ours), other(theirs)
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.01
