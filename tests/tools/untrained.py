"""Checkpoints of models with weights as they are drawn, and scripts called in this process."""

import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from scripts import ROOT

CONFIGS = ROOT / 'configs'
CLASSIFICATION = CONFIGS / 'classification/vrwkv/vrwkv_digits.py'
CLASSIFICATION6 = CONFIGS / 'classification/vrwkv6/vrwkv6_digits.py'
DETECTION = CONFIGS / 'detection/mask_rcnn/mask_rcnn_vrwkv_adapter_digits.py'
SEGMENTATION = CONFIGS / 'segmentation/digits/upernet_vrwkv_adapter_digits.py'


def write(config: Path, path: Path, options: dict | None = None, **meta) -> Path:
    """The model of a config as a checkpoint with this metadata."""
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(options or {})
    if 'init_cfg' in cfg.model.backbone:
        cfg.model.backbone.init_cfg = None  # no network here
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    if cfg.get('data_preprocessor'):
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(cfg.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({'state_dict': model.state_dict(), 'meta': meta}, path)
    return path


def call(module, monkeypatch, *arguments) -> None:
    """main() of a script."""
    monkeypatch.setattr(sys, 'argv', [module.__file__, *map(str, arguments)])
    module.main()
