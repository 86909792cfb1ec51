"""What the paper and the released models say of each classification row, written down independently of the configs."""

import json
from pathlib import Path
from types import SimpleNamespace

from mmengine.config import Config
from mmengine.registry import init_default_scope

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs/classification'
TENSORS = json.loads((ROOT / 'tests/golden/state_dicts.json').read_text())

# norm: (post_norm, init_values, key_norm)
T = {'dims': 192, 'drop_path': 0.0, 'norm': (False, None, False)}
S = {'dims': 384, 'drop_path': 0.3, 'norm': (True, 1, False)}
S6 = {**S, 'norm': (True, 1e-5, False)}
B = {'dims': 768, 'drop_path': 0.5, 'norm': (True, 1e-5, False)}
L = {'dims': 1024, 'drop_path': 0.1, 'norm': (True, 1e-5, True)}
ROWS = {
    'vrwkv/vrwkv_tiny_8xb128_in1k': {**T, 'tensors': 'vrwkv_t', 'params': 6.2, 'batch': 128},
    'vrwkv/vrwkv_small_8xb128_in1k': {**S, 'tensors': 'vrwkv_s', 'params': 23.8, 'batch': 128},
    'vrwkv/vrwkv_base_16xb64_in1k': {**B, 'tensors': 'vrwkv_b', 'params': 93.7, 'batch': 64},
    'vrwkv/vrwkv_l_22kto1k_384': {**L, 'tensors': 'vrwkv_l_384', 'params': 334.9, 'batch': 128},
    'vrwkv/vrwkv_l_in22k_192': {**L, 'tensors': 'vrwkv_l_384', 'params': None, 'batch': 128},
    'vrwkv6/vrwkv6_tiny_8xb128_in1k': {**T, 'tensors': 'vrwkv6_t', 'params': 7.6, 'batch': 128},
    'vrwkv6/vrwkv6_small_8xb128_in1k': {**S6, 'tensors': 'vrwkv6_s', 'params': 27.7, 'batch': 128},
    'vrwkv6/vrwkv6_base_16xb64_in1k': {**B, 'tensors': 'vrwkv6_b', 'params': 104.9, 'batch': 64},
}
LARGE = [name for name in ROWS if '_l_' in name]
REGULAR = [name for name in ROWS if name not in LARGE]  # tiny, small and base of both versions
DIGITS = ['vrwkv/vrwkv_digits', 'vrwkv6/vrwkv6_digits']


def load(name: str) -> SimpleNamespace:
    """(config, row) of ``name``; the config's scope becomes the current one."""
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    init_default_scope(cfg.default_scope)
    return SimpleNamespace(cfg=cfg, **ROWS.get(name, {}))
