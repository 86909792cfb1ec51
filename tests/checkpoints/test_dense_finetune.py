"""The configs to fine-tune dense models with: a released file fits, last layers are new, first layers frozen."""

import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from released import tensors_of

from vision_rwkv.checkpoints import fit

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    'adapter_t_det': 'configs/detection/mask_rcnn/mask_rcnn_vrwkv_adapter_tiny_finetune.py',
    'adapter_t_seg': 'configs/segmentation/ade20k/upernet_vrwkv_adapter_tiny_finetune_384.py',
}
LAST_LAYERS = {
    'adapter_t_det': ('roi_head.bbox_head.fc_cls', 'roi_head.bbox_head.fc_reg', 'roi_head.mask_head.conv_logits'),
    'adapter_t_seg': ('decode_head.conv_seg', 'auxiliary_head.conv_seg'),
}


@pytest.mark.parametrize('released', CONFIGS)
def test_a_released_file_fits(released):
    pytest.importorskip('mmcv.ops', reason='needs mmcv with its operators')
    sys.path.insert(0, str(ROOT))
    cfg = Config.fromfile(ROOT / CONFIGS[released])
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    fitted = fit({'state_dict': tensors_of(released)}, model, start=True)
    assert set(fitted.new) == {f'{layer}.{item}' for layer in LAST_LAYERS[released] for item in ('weight', 'bias')}
    assert not any(p.requires_grad for layer in model.backbone.layers[:2] for p in layer.parameters())
    assert all(p.requires_grad for layer in model.backbone.layers[2:] for p in layer.parameters())
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        assert loader.dataset.metainfo.classes == cfg.classes and loader.dataset.data_root == cfg.data_root
