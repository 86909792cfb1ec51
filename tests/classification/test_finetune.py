"""The config to fine-tune with: what it loads, freezes, and how fast each layer learns."""

import sys
from pathlib import Path

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmpretrain.registry import MODELS
from published import load

from vision_rwkv.checkpoints import fit

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'checkpoints'))
from released import tensors_of  # noqa: E402


@pytest.fixture(scope='module')
def cfg():
    return load('vrwkv/vrwkv_tiny_finetune_384').cfg


@pytest.fixture(scope='module')
def model(cfg):
    return MODELS.build(cfg.model)


def test_it_starts_from_the_released_file(cfg, model):
    assert cfg.load_from.endswith('/vrwkv_t_in1k_224.pth')
    tensors = tensors_of('vrwkv_t')
    tensors['backbone.pos_embed'] = torch.randn(1, 196, 192)
    fitted = fit({'state_dict': tensors}, model, start=True)
    assert fitted.new == ['head.fc.weight', 'head.fc.bias'] and model.head.fc.weight.shape == (5, 192)
    assert fitted.tensors['backbone.pos_embed'].shape == (1, 576, 192)


def test_layer_decay_and_freezing(cfg, model):
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    rates = {id(p): group['lr'] for group in wrapper.param_groups for p in group['params']}
    decays = {id(p): group['weight_decay'] for group in wrapper.param_groups for p in group['params']}
    for name, parameter in model.named_parameters():
        part, _, rest = name.removeprefix('backbone.').partition('.')
        layer = int(rest.split('.')[0]) if part == 'layers' else None
        if part in ('patch_embed', 'pos_embed') or layer in (0, 1):
            assert id(parameter) not in rates and not parameter.requires_grad, name
            continue
        below = 0 if layer is None else 12 - layer
        assert rates[id(parameter)] == pytest.approx(5e-4 * 0.75**below), name
        assert decays[id(parameter)] == (0.05 if parameter.ndim > 1 else 0.0), name


def test_wrong_settings_are_named(cfg, model):
    bad = {**cfg.optim_wrapper, 'paramwise_cfg': {'layer_decay': 0.5}}
    with pytest.raises(ValueError, match=r"dict\(layer_decay_rate=RATE\), 0 < RATE <= 1, got {'layer_decay': 0.5}"):
        build_optim_wrapper(model, bad)
