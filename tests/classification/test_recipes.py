"""The recipes of the configs, built and compared with what was published."""

import math
import re

import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmengine.hooks import EMAHook
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, PARAM_SCHEDULERS
from mmpretrain.registry import DATASETS, METRICS, MODELS, TRANSFORMS
from mmpretrain.visualization import UniversalVisualizer
from PIL import Image
from published import DIGITS, LARGE, REGULAR, ROWS, load

MIXED = [name for name in REGULAR if '_tiny_' not in name]


def optimizer_of(name, monkeypatch):
    """(optimiser wrapper, {parameter name: its group}) of a config, for the model on the meta device."""
    # Half precision refuses to be built without a GPU; its settings can be looked at all the same.
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)
    cfg = load(name).cfg
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    groups = {id(p): group for group in wrapper.param_groups for p in group['params']}
    return wrapper, {key: groups[id(p)] for key, p in model.named_parameters()}


@pytest.mark.parametrize('name', [*ROWS, *DIGITS])
def test_optimizer(name, monkeypatch):
    wrapper, groups = optimizer_of(name, monkeypatch)
    lr = 1e-5 if '22kto1k' in name else 2e-3 if name in DIGITS else 1e-3
    assert type(wrapper.optimizer) is torch.optim.AdamW
    assert {group['lr'] for group in groups.values()} == {lr}
    assert {group['betas'] for group in groups.values()} == {(0.9, 0.999)}
    assert wrapper.clip_grad_kwargs == {'max_norm': 1.0 if name in LARGE else 5.0}
    assert type(wrapper).__name__ == ('AmpOptimWrapper' if name in LARGE else 'OptimWrapper')
    if name in LARGE:
        assert wrapper.cast_dtype is torch.float16
        assert wrapper._scale_update_param is None  # dynamic


def last(key: str) -> str:
    """The name of a parameter within its module, or with it for norm layers and biases."""
    parts = key.split('.')
    return '.'.join(parts[-2:]) if parts[-1] in ('weight', 'bias') else parts[-1]


@pytest.mark.parametrize('name', [*REGULAR, *DIGITS])
def test_only_norms_and_biases_are_not_decayed(name, monkeypatch):
    _, groups = optimizer_of(name, monkeypatch)
    free = {last(key) for key, group in groups.items() if group['weight_decay'] == 0}
    decayed = {last(key) for key, group in groups.items() if group['weight_decay'] == 0.05}
    assert len(groups) == sum(group['weight_decay'] in (0, 0.05) for group in groups.values())

    norms = {f'{norm}.{kind}' for norm in ('ln0', 'ln1', 'ln2') for kind in ('weight', 'bias')}
    linear = {'projection.weight', 'key.weight', 'receptance.weight', 'value.weight', 'output.weight', 'fc.weight'}
    mixes = {'spatial_mix_k', 'spatial_mix_r'}
    if 'vrwkv6' in name:
        norms |= {'ln_x.weight', 'ln_x.bias'}
        linear |= {'gate.weight'}
        mixes |= {f'time_maa_{letter}' for letter in 'xwkvrg'} | {'time_maa_w1', 'time_maa_w2'}
        mixes |= {'time_decay', 'time_decay_w1', 'time_decay_w2', 'time_faaaa'}
    else:
        mixes |= {'spatial_mix_v', 'spatial_decay', 'spatial_first'}
    gammas = {'gamma1', 'gamma2'} if name in MIXED else set()
    assert free == norms | {'projection.bias', 'fc.bias'}
    assert decayed == linear | mixes | gammas | {'pos_embed'}


@pytest.mark.parametrize('name', LARGE)
def test_large_model_decays_no_flat_tensor_but_decay_and_first(name, monkeypatch):
    _, groups = optimizer_of(name, monkeypatch)
    for key, group in groups.items():
        decays = group['params'][0].ndim > 1 or re.search(r'att\.spatial_(decay|first)$', key)
        assert group['weight_decay'] == (0.05 if decays else 0), key
    mixes = [key for key in groups if 'spatial_mix' in key]
    assert len(mixes) == 24 * 5 and all(groups[key]['weight_decay'] == 0.05 for key in mixes)
    assert sum('spatial_decay' in key for key in groups) == 24


EPOCHS = {'digits': 30, '22kto1k': 20, 'in22k': 30}


@pytest.mark.parametrize('name', [*ROWS, *DIGITS])
def test_learning_rate(name):
    cfg = load(name).cfg
    per_epoch = 22 if name in DIGITS else 60
    epochs = next((number for key, number in EPOCHS.items() if key in name), 300)
    warm = 4 if name in DIGITS else 2 if name in LARGE else 20
    lr, floor, start = cfg.optim_wrapper.optimizer.lr, 0.01, 0.01 if name in DIGITS else 1e-3
    first = warm if name in DIGITS else 0  # where the cosine begins
    assert cfg.train_cfg.max_epochs == epochs

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedulers = []
    for scheduler in map(dict, cfg.param_scheduler):
        assert scheduler.pop('convert_to_iter_based')
        cls = PARAM_SCHEDULERS.get(scheduler.pop('type'))
        schedulers.append(cls.build_iter_from_epoch(optimizer=optimizer, epoch_length=per_epoch, **scheduler))
    rates = []
    for _ in range(epochs * per_epoch):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()

    for epoch in (0, warm / 4, warm / 2, warm, warm + 1, epochs / 2, 0.9 * epochs, epochs - 1):
        done = max(epoch - first, 0) / (epochs - first)
        cosine = floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2
        ramp = start + (1 - start) * min(epoch / warm, 1)
        # A ramp over n iterations is at its end one iteration early.
        expected = pytest.approx(lr * cosine * ramp, rel=1.2 / (warm * per_epoch) if epoch < warm else 2e-3)
        assert rates[int(epoch * per_epoch)] == expected, epoch


@pytest.mark.parametrize('name', ROWS)
def test_batches_and_preprocessing(name):
    row = load(name)
    cfg = row.cfg
    gpus = int(match[1]) if (match := re.search(r'_(\d+)xb', name)) else 32 if 'in22k' in name else 8
    assert cfg.train_dataloader.batch_size == row.batch
    assert cfg.auto_scale_lr == {'base_batch_size': gpus * row.batch}
    assert gpus * row.batch == (4096 if 'in22k' in name else 1024)
    sampler = cfg.train_dataloader.sampler
    assert (sampler.type, sampler.shuffle) == ('DefaultSampler', True)
    preprocessor = MODELS.build({'type': 'ClsDataPreprocessor', **cfg.data_preprocessor})
    assert preprocessor.mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert preprocessor.std.flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])
    blue = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)  # images are read as BGR
    out = preprocessor({'inputs': blue})['inputs'].flatten()
    assert out.tolist() == pytest.approx([-123.675 / 58.395, -116.28 / 57.12, (255 - 103.53) / 57.375], rel=1e-5)


@pytest.mark.parametrize('name', ROWS)
def test_mixup_and_cutmix(name):
    cfg = load(name).cfg
    with torch.device('meta'):
        model = MODELS.build({**cfg.model, 'data_preprocessor': cfg.data_preprocessor})
    augments = model.data_preprocessor.batch_augments
    if name in MIXED:
        assert [(type(a).__name__, a.alpha) for a in augments.augments] == [('Mixup', 0.8), ('CutMix', 1.0)]
        assert augments.probs is None  # evenly
    elif '22kto1k' in name:
        assert (type(augments.augments[0]).__name__, augments.augments[0].alpha) == ('Mixup', 0.8)
        assert augments.probs == [0.5, 0.5] and augments.augments[1] is None
    else:
        assert augments is None


def image_file(folder) -> str:
    """A photograph's size, noise for content."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / 'image.png')
    return str(folder / 'image.png')


def steps_of(pipeline) -> dict:
    """{type: config} of a pipeline."""
    return {step.type: step for step in pipeline}


@pytest.mark.parametrize('name', ROWS)
def test_training_pipeline(name, tmp_path):
    cfg = load(name).cfg
    size = 384 if '384' in name else 192 if '192' in name else 224
    pipeline = cfg.train_dataloader.dataset.pipeline
    out = Compose([TRANSFORMS.build(step) for step in pipeline])({'img_path': image_file(tmp_path), 'gt_label': 3})
    assert out['inputs'].shape == (3, size, size) and out['inputs'].dtype is torch.uint8
    steps = steps_of(pipeline)
    assert steps['RandomResizedCrop'].interpolation == 'bicubic' and steps['RandomResizedCrop'].backend == 'pillow'
    crop = TRANSFORMS.build(steps['RandomResizedCrop'])
    assert crop.crop_ratio_range == (0.08, 1.0)
    assert steps['RandomFlip'].prob == 0.5
    if name in LARGE:
        assert list(steps) == ['LoadImageFromFile', 'RandomResizedCrop', 'RandomFlip', 'PackInputs']
        return
    augment = steps['RandAugment']
    assert augment.policies == 'timm_increasing'
    assert (augment.num_policies, augment.magnitude_level, augment.total_level, augment.magnitude_std) == (
        2,
        9,
        10,
        0.5,
    )
    assert steps['RandomErasing'].erase_prob == 0.25
    assert list(steps)[-2:] == ['RandomErasing', 'PackInputs']


@pytest.mark.parametrize('name', [name for name in ROWS if 'in22k' not in name])
def test_test_pipeline(name, tmp_path):
    cfg = load(name).cfg
    edge, size = (384, 384) if name in LARGE else (256, 224)
    pipeline = cfg.test_dataloader.dataset.pipeline
    assert pipeline == cfg.val_dataloader.dataset.pipeline
    steps = steps_of(pipeline)
    assert list(steps) == ['LoadImageFromFile', 'ResizeEdge', 'CenterCrop', 'PackInputs']
    resize = steps['ResizeEdge']
    assert (resize.scale, resize.edge, resize.interpolation, resize.backend) == (edge, 'short', 'bicubic', 'pillow')
    out = Compose([TRANSFORMS.build(step) for step in pipeline])({'img_path': image_file(tmp_path), 'gt_label': 3})
    assert out['inputs'].shape == (3, size, size)
    short = np.asarray(Image.open(tmp_path / 'image.png').resize((round(edge * 4 / 3), edge), Image.BICUBIC))
    top, left = (short.shape[0] - size) // 2, (short.shape[1] - size) // 2
    crop = torch.from_numpy(short[top : top + size, left : left + size, ::-1].copy()).permute(2, 0, 1)
    assert (out['inputs'].int() - crop.int()).abs().float().mean() < 1
    metric = METRICS.build(cfg.test_evaluator)
    assert metric.topk == (1, 5)


@pytest.mark.parametrize('name', [*ROWS, *DIGITS])
def test_hooks(name):
    cfg = load(name).cfg
    UniversalVisualizer.get_instance('tests')  # the visualization hook asks for one
    hooks = {key: HOOKS.build(hook) for key, hook in cfg.default_hooks.items()}
    assert hooks['checkpoint'].save_best == (None if 'in22k' in name else ['accuracy/top1'])
    assert hooks['checkpoint'].max_keep_ckpts == 3 and hooks['checkpoint'].interval == 1
    custom = [HOOKS.build(hook) for hook in cfg.get('custom_hooks', [])]
    if '22kto1k' in name:
        (ema,) = custom
        assert isinstance(ema, EMAHook) and ema.ema_cfg['momentum'] == 1e-4
    else:
        assert not custom
    assert cfg.randomness.seed == 0


@pytest.mark.parametrize('name', ROWS)
def test_data_sets(name, tmp_path):
    """ImageNet's layout is read: two images each, listed with their classes."""
    cfg = load(name).cfg
    for split in ('train', 'val'):
        for label in ('n01440764', 'n01443537'):
            (tmp_path / split / label).mkdir(parents=True)
            Image.new('RGB', (8, 8)).save(tmp_path / split / label / 'a.jpg')
    if 'in22k' not in name:  # class names are built in, so that the labels come from a list
        (tmp_path / 'meta').mkdir()
        for split in ('train', 'val'):
            (tmp_path / 'meta' / f'{split}.txt').write_text('n01440764/a.jpg 0\nn01443537/a.jpg 1\n')
    for loader in (cfg.train_dataloader, cfg.get('val_dataloader')):
        if loader:
            dataset = DATASETS.build({**loader.dataset, 'data_root': str(tmp_path)})
            assert [dataset.get_data_info(i)['gt_label'] for i in range(len(dataset))] == [0, 1]
