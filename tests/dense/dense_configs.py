"""What was published of the detection and segmentation models, written down independently of the configs."""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

import detection  # noqa: F401  # registers
import segmentation  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs'
TENSORS = json.loads((ROOT / 'tests/golden/state_dicts.json').read_text())

QUARTERS = [[0, 2], [3, 5], [6, 8], [9, 11]]
T = {'dims': 192, 'params': 8.4, 'drop_path': 0.1, 'heads': 6, 'ratio': 1.0, 'norm': (False, 1.0, False)}
S = {'dims': 384, 'params': 29.3, 'drop_path': 0.2, 'heads': 6, 'ratio': 1.0, 'norm': (True, 1e-5, False)}
B = {'dims': 768, 'params': 106.6, 'drop_path': 0.3, 'heads': 12, 'ratio': 0.5, 'norm': (True, 1e-5, False)}
L = {'dims': 1024, 'params': 351.9, 'drop_path': 0.4, 'heads': 16, 'ratio': 0.5, 'norm': (True, 1e-5, True)}
L |= {'depth': 24, 'image': 192, 'interactions': [[0, 5], [6, 11], [12, 17], [18, 23]]}
SIZES = {'tiny': T, 'small': S, 'base': B, 'large': L}
START = {'vrwkv_large': 'vrwkv_l_in22k_192.pth'}

ROWS = {}
for version in ('vrwkv', 'vrwkv6'):
    for size, row in SIZES.items():
        if (version, size) == ('vrwkv6', 'large'):
            continue
        start = START.get(f'{version}_{size}', f'{version}_{size[0]}_in1k_224.pth')
        common = {'depth': 12, 'image': 224, 'interactions': QUARTERS, 'version': version, 'start': start, **row}
        tensors = f'adapter_{size[0]}' if version == 'vrwkv' else None
        common |= {'size': size, 'tensors': tensors}
        ROWS[f'detection/mask_rcnn/mask_rcnn_{version}_adapter_{size}_fpn_1x_coco'] = common
        ROWS[f'segmentation/ade20k/upernet_{version}_adapter_{size}_512_160k_ade20k'] = common
DETECTION = [name for name in ROWS if name.startswith('detection')]
SEGMENTATION = [name for name in ROWS if name.startswith('segmentation')]
DIGITS = [
    'detection/mask_rcnn/mask_rcnn_vrwkv_adapter_digits',
    'segmentation/digits/upernet_vrwkv_adapter_digits',
]


def models(name: str):
    """The toolbox's registry of models."""
    if name.startswith('detection'):
        from mmdet.registry import MODELS
    else:
        from mmseg.registry import MODELS
    return MODELS


def load(name: str) -> SimpleNamespace:
    """(config, row) of ``name``; the config's scope becomes the current one."""
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    init_default_scope(cfg.default_scope)
    return SimpleNamespace(cfg=cfg, **ROWS.get(name, {}))


@cache
def on_meta(name: str) -> torch.nn.Module:
    """The model of a config on the meta device, where it costs nothing."""
    cfg = load(name).cfg
    with torch.device('meta'):
        return models(name).build(cfg.model)
