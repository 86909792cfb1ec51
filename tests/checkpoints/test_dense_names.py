"""MMDetection's and MMSegmentation's models of today have the tensors of files from 2.28 and 0.30."""

import importlib.util
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from released import mask_rcnn, upernet
from torch._subclasses.fake_tensor import FakeTensorMode

BASES = {
    'mmdet': ('mask-rcnn_r50_fpn.py', mask_rcnn),
    'mmseg': ('upernet_r50.py', upernet),
}
CONFIG = """
_base_ = ['{base}']
default_scope = '{scope}'
custom_imports = dict(imports=['{scope}.models'])
"""
CHANGES = {
    'mmdet': {'model.neck.in_channels': [192] * 4},
    'mmseg': {
        'model.decode_head.in_channels': [192] * 4,
        'model.auxiliary_head.in_channels': 192,
        'model.decode_head.num_classes': 150,
        'model.auxiliary_head.num_classes': 150,
    },
}


@pytest.mark.parametrize('scope', BASES)
def test_names_and_shapes(scope, tmp_path):
    base, expected = BASES[scope]
    pytest.importorskip('mmcv.ops', reason='needs mmcv with its operators')
    folder = Path(importlib.util.find_spec(scope).origin).parent / '.mim/configs/_base_/models'
    (tmp_path / 'config.py').write_text(CONFIG.format(base=folder / base, scope=scope))
    cfg = Config.fromfile(tmp_path / 'config.py')
    cfg.merge_from_dict(CHANGES[scope])
    init_default_scope(scope)
    with FakeTensorMode():
        state = MODELS.build(cfg.model).state_dict()
    rest = {name: tuple(tensor.shape) for name, tensor in state.items() if not name.startswith('backbone.')}
    assert rest == expected(192)
