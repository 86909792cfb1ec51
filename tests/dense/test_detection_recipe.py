"""The detection configs, compared with the published recipe."""

import pytest
import torch
from dense_configs import DETECTION, DIGITS, load, on_meta
from mmengine.optim import build_optim_wrapper
from recipes import rates, steps_of


@pytest.mark.parametrize('name', DETECTION)
def test_optimizer(name):
    cfg = load(name).cfg
    wrapper = build_optim_wrapper(on_meta(name), cfg.optim_wrapper)
    lr, weight_decay = (2e-4, 0.01) if 'tiny' in name else (1e-4, 0.05)
    assert type(wrapper).__name__ == 'OptimWrapper' and type(wrapper.optimizer) is torch.optim.AdamW
    assert wrapper.clip_grad_kwargs is None
    groups = wrapper.param_groups
    assert {group['betas'] for group in groups} == {(0.9, 0.999)}
    assert {group['weight_decay'] for group in groups} == {0, weight_decay}
    found = sorted({group['lr'] for group in groups}, reverse=True)
    assert found == pytest.approx([lr * 0.85**k for k in range(load(name).depth + 2)])


@pytest.mark.parametrize('name', DETECTION)
def test_schedule(name):
    cfg = load(name).cfg
    assert cfg.train_cfg.max_epochs == 12 and cfg.train_cfg.val_interval == 1
    per_epoch = 1000
    found = rates(cfg.param_scheduler, 1.0, 12 * per_epoch, per_epoch)
    assert (
        found[0] == pytest.approx(1e-3)
        and found[250] == pytest.approx(0.5, abs=0.01)
        and found[500] == pytest.approx(1)
    )
    expected = {7.9: 1, 8.1: 0.1, 10.9: 0.1, 11.1: 0.01, 11.9: 0.01}
    assert {epoch: found[int(epoch * per_epoch)] for epoch in expected} == pytest.approx(expected)


@pytest.mark.parametrize('name', DETECTION)
def test_data(name):
    cfg = load(name).cfg
    loader = cfg.train_dataloader
    assert loader.batch_size == 2 and cfg.auto_scale_lr.base_batch_size == 16
    assert (loader.dataset.type, loader.dataset.ann_file) == ('CocoDataset', 'annotations/instances_train2017.json')
    steps = steps_of(loader.dataset.pipeline)
    assert list(steps) == ['LoadImageFromFile', 'LoadAnnotations', 'Resize', 'RandomFlip', 'PackDetInputs']
    assert steps['Resize'].scale == (1333, 800) and steps['Resize'].keep_ratio and steps['RandomFlip'].prob == 0.5
    assert steps_of(cfg.test_dataloader.dataset.pipeline)['Resize'].scale == (1333, 800)
    assert cfg.val_evaluator.type == 'CocoMetric' and cfg.val_evaluator.metric == ['bbox', 'segm']
    loaders = (loader, cfg.val_dataloader, cfg.test_dataloader)
    assert not any(each.persistent_workers for each in loaders)  # see the config


@pytest.mark.parametrize('name', [*DETECTION, DIGITS[0]])
def test_runtime(name):
    cfg = load(name).cfg
    assert cfg.custom_imports.imports == ['detection'] and cfg.randomness.seed == 0
    checkpoint = cfg.default_hooks.checkpoint
    assert (checkpoint.save_best, checkpoint.max_keep_ckpts) == ('coco/bbox_mAP', 3)
