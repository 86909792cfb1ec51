"""The segmentation configs, compared with the published recipe."""

import numpy as np
import pytest
import torch
from dense_configs import DIGITS, SEGMENTATION, load, on_meta
from mmcv.transforms import Compose
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS, TRANSFORMS
from PIL import Image
from recipes import rates, steps_of

RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
DECAY = {'tiny': 0.95, 'small': 0.85, 'base': 0.8, 'large': 0.9}


@pytest.mark.parametrize('name', SEGMENTATION)
def test_optimizer(name, monkeypatch):
    # Half precision refuses to be built without a GPU; its settings can be looked at all the same.
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)
    row = load(name)
    wrapper = build_optim_wrapper(on_meta(name), row.cfg.optim_wrapper)
    lr = 12e-5 if row.size == 'tiny' else 6e-5
    assert type(wrapper).__name__ == 'AmpOptimWrapper' and type(wrapper.optimizer) is torch.optim.AdamW
    assert wrapper.cast_dtype is torch.float16 and wrapper.clip_grad_kwargs is None
    assert wrapper._scale_update_param is None and row.cfg.optim_wrapper.loss_scale == {'init_scale': 512}  # dynamic
    groups = wrapper.param_groups
    assert {group['betas'] for group in groups} == {(0.9, 0.999)}
    assert {group['weight_decay'] for group in groups} == {0, 0.01}
    found = sorted({group['lr'] for group in groups}, reverse=True)
    assert found == pytest.approx([lr * DECAY[row.size] ** k for k in range(row.depth + 2)])


def test_schedule():
    schedules = [load(name).cfg.param_scheduler for name in SEGMENTATION]
    assert all(schedule == schedules[0] for schedule in schedules)
    assert all(load(name).cfg.train_cfg.max_iters == 160000 for name in SEGMENTATION)
    found = rates(schedules[0], 1.0, 160000)
    assert found[0] == pytest.approx(1e-6, rel=1e-3)
    for iteration in (100, 750, 1400):
        ramp = 1e-6 + (1 - 1e-6) * iteration / 1499  # a ramp over n iterations is at its end one iteration early
        assert found[iteration] == pytest.approx(ramp * (1 - iteration / 160000), rel=1e-3)
    for iteration in (1500, 80000, 159000):
        assert found[iteration] == pytest.approx(1 - iteration / 160000, rel=1e-3)


@pytest.mark.parametrize('name', SEGMENTATION)
def test_data(name):
    cfg = load(name).cfg
    loader = cfg.train_dataloader
    assert loader.batch_size == 2 and cfg.auto_scale_lr.base_batch_size == 16
    assert (loader.dataset.type, loader.sampler.type) == ('ADE20KDataset', 'InfiniteSampler')
    assert DATASETS.build({**loader.dataset, 'lazy_init': True}).reduce_zero_label
    steps = steps_of(loader.dataset.pipeline)
    expected = ['LoadImageFromFile', 'LoadAnnotations', 'RandomResize', 'RandomCrop', 'RandomFlip']
    assert list(steps) == [*expected, 'PhotoMetricDistortion', 'PackSegInputs']
    assert (steps['RandomResize'].scale, steps['RandomResize'].ratio_range) == ((2048, 512), (0.5, 2.0))
    assert (steps['RandomCrop'].crop_size, steps['RandomCrop'].cat_max_ratio) == ((512, 512), 0.75)
    assert cfg.val_evaluator == {'type': 'IoUMetric', 'iou_metrics': ['mIoU']}
    assert not any(each.persistent_workers for each in (loader, cfg.val_dataloader, cfg.test_dataloader))


def transformed(pipeline, tmp_path, height: int, width: int) -> dict:
    """What a pipeline of ADE20K makes of an image."""
    init_default_scope('mmseg')
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(tmp_path / 'a.jpg')
    Image.fromarray(np.ones((height, width), np.uint8)).save(tmp_path / 'a.png')
    paths = {'img_path': str(tmp_path / 'a.jpg'), 'seg_map_path': str(tmp_path / 'a.png')}
    info = {**paths, 'reduce_zero_label': True, 'label_map': None, 'seg_fields': [], 'num_classes': 150}
    return Compose([TRANSFORMS.build(step) for step in pipeline])(info)


@pytest.mark.parametrize(
    ('size', 'expected'), [((300, 450), (512, 768)), ((683, 512), (704, 512)), ((100, 600), (352, 2048))]
)
def test_test_images_have_sides_of_whole_32s(size, expected, tmp_path):
    cfg = load(SEGMENTATION[0]).cfg
    for pipeline in (cfg.val_dataloader.dataset.pipeline, cfg.test_dataloader.dataset.pipeline):
        out = transformed(pipeline, tmp_path, *size)
        assert tuple(out['inputs'].shape[1:]) == expected
        assert tuple(out['data_samples'].gt_sem_seg.shape) == size


def test_test_time_augmentation(tmp_path):
    cfg = load(SEGMENTATION[0]).cfg
    out = transformed(cfg.tta_pipeline, tmp_path, 320, 448)
    assert len(out['inputs']) == 2 * len(RATIOS)
    sizes = [tuple(image.shape[1:]) for image in out['inputs'][::2]]
    assert [size[0] for size in sizes] == [256, 384, 512, 640, 768, 896]
    assert all(size % 32 == 0 for pair in sizes for size in pair)
    assert [sample.get('flip', False) for sample in out['data_samples']] == [False, True] * len(RATIOS)
    model = MODELS.build({**cfg.tta_model, 'module': load(DIGITS[1]).cfg.model}).eval()
    samples = [[sample] for sample in out['data_samples'][:2]]
    with torch.no_grad():
        (merged,) = model.test_step({'inputs': [image[None] for image in out['inputs'][:2]], 'data_samples': samples})
    assert tuple(merged.pred_sem_seg.shape) == (320, 448)


@pytest.mark.parametrize('name', [*SEGMENTATION, DIGITS[1]])
def test_runtime(name):
    cfg = load(name).cfg
    assert cfg.custom_imports.imports == ['segmentation'] and cfg.randomness.seed == 0
    checkpoint = cfg.default_hooks.checkpoint
    assert (checkpoint.save_best, checkpoint.max_keep_ckpts, checkpoint.by_epoch) == ('mIoU', 3, False)
    assert checkpoint.interval == cfg.train_cfg.val_interval == (600 if name in DIGITS else 16000)
