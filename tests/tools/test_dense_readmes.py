"""Every command of the READMEs of detection and segmentation, in its order, on data sets of a few images."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from scripts import ROOT, call

# What makes a command short enough for a test; the ADE20K configs are for GPUs.
SHORT = ['model.backbone.depth=4', 'model.backbone.interaction_indexes=None', 'model.backbone.embed_dims=64']
SHORT += ['model.backbone.deform_num_heads=4']
SHORT += [f'{side}_dataloader.num_workers=0' for side in ('val', 'test')]
SHORT_TRAIN = ['train_dataloader.batch_size=2', 'train_dataloader.num_workers=0']
DETECTION = ['model.neck.in_channels=[64,64,64,64]', 'test_dataloader.dataset.pipeline.1.scale=(160,120)']
DETECTION_TRAIN = ['train_cfg.max_epochs=1', 'train_dataloader.dataset.pipeline.2.scale=(160,120)']
DETECTION_TRAIN += ['val_dataloader.dataset.pipeline.1.scale=(160,120)']
SEGMENTATION = ['model.decode_head.in_channels=[64,64,64,64]', 'model.decode_head.channels=32']
SEGMENTATION += [
    'model.auxiliary_head.in_channels=64',
    'model.test_cfg.crop_size=(64,64)',
    'model.test_cfg.stride=(43,43)',
]
SEGMENTATION += ['test_dataloader.dataset.pipeline.1.scale=(256,64)']
SEGMENTATION_TRAIN = ['train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'default_hooks.checkpoint.interval=2']
SEGMENTATION_TRAIN += ['val_dataloader.dataset.pipeline.1.scale=(256,64)']
SEGMENTATION_TRAIN += ['train_dataloader.dataset.pipeline.3.crop_size=(64,64)', 'model.data_preprocessor.size=(64,64)']
DIGITS = {
    'detection': ['train_cfg.max_epochs=1', 'train_cfg.val_interval=1'],
    'segmentation': ['train_cfg.max_iters=3', 'train_cfg.val_interval=3', 'default_hooks.checkpoint.interval=3'],
}


def readme(task: str) -> str:
    return (ROOT / task / 'README.md').read_text()


def commands(task: str) -> list[str]:
    blocks = re.findall(r'```bash\n(.*?)```', readme(task), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def shortened(command: str, task: str) -> str:
    """``command`` with one process for several and with small settings."""
    command = re.sub(r'(\.py|\.pth) [248]( |$)', r'\1 1\2', command)
    if 'make_digits' in command:
        return f'{command} --scenes 12'
    if 'dist_' not in command:
        return command
    train = 'dist_train' in command
    if 'digits' in command:
        options = DIGITS[task] if train else []
    elif task == 'detection':
        options = SHORT + DETECTION + (SHORT_TRAIN + DETECTION_TRAIN if train else [])
    else:
        options = SHORT + SEGMENTATION + (SHORT_TRAIN + SEGMENTATION_TRAIN if train else [])
    if 'vrwkv6' in command:
        options = [*options, 'model.backbone.num_heads=1']
    if train and 'init_cfg' not in command and 'digits' not in command:
        options = [*options, 'model.backbone.init_cfg=None']  # no network here
    if not options:
        return command
    joined = ' '.join(f"'{option}'" for option in options)
    return f'{command} {joined}' if '--cfg-options' in command else f'{command} --cfg-options {joined}'


def write_coco(folder: Path, images: str, annotations: str, names: tuple[str, ...]) -> None:
    """Two images with an object each, in COCO's format."""
    contents = {'images': [], 'annotations': [], 'categories': []}
    contents['categories'] = [{'id': i + 1, 'name': name} for i, name in enumerate(names)]
    mask = np.zeros((60, 80), np.uint8, order='F')
    mask[10:40, 20:60] = 1
    runs = coco_mask.encode(mask)
    segmentation = {'size': runs['size'], 'counts': runs['counts'].decode()}
    for number in range(2):
        (folder / images).mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (80, 60), (90 * number, 90, 30)).save(folder / images / f'{number}.jpg')
        contents['images'].append({'id': number, 'file_name': f'{number}.jpg', 'height': 60, 'width': 80})
        box = {'bbox': [20, 10, 40, 30], 'area': 1200, 'iscrowd': 0, 'segmentation': segmentation}
        contents['annotations'].append({'id': number + 1, 'image_id': number, 'category_id': number + 1, **box})
    path = folder / annotations
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents))


def write_masks(folder: Path, images: str, masks: str, classes: int) -> None:
    """Two images with a mask each."""
    for number in range(2):
        for name in (images, masks):
            (folder / name).mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (80, 60), (90 * number, 90, 30)).save(folder / images / f'{number}.jpg')
        labels = np.arange(60 * 80, dtype=np.uint8).reshape(60, 80) % classes
        Image.fromarray(labels).save(folder / masks / f'{number}.png')


def copy_configs(folder: Path) -> None:
    """The configs, in float32 for machines without a GPU, with an eighth of the sizes of test-time augmentation."""
    shutil.copytree(ROOT / 'configs', folder / 'configs')
    path = folder / 'configs/segmentation/_base_/schedules/adamw_160k.py'
    half = r"    (type='AmpOptimWrapper'|dtype='float16'|loss_scale=dict\(init_scale=512\.0\)),.*\n"
    text, count = re.subn(half, '', path.read_text())
    assert count == 3
    path.write_text(text)
    path = folder / 'configs/segmentation/_base_/datasets/ade20k_512.py'
    sizes = 'int(2048 * r), int(512 * r)'
    assert sizes in path.read_text()
    path.write_text(path.read_text().replace(sizes, 'int(256 * r), int(64 * r)'))


@pytest.fixture
def clone(request, tmp_path) -> Path:
    """A folder that looks like the repository, with data, a checkpoint to start from, and the README's own config."""
    task = request.param
    (tmp_path / 'tools').symlink_to(ROOT / 'tools')
    copy_configs(tmp_path)
    if task == 'detection':
        from mmdet.datasets import CocoDataset

        names = CocoDataset.METAINFO['classes']
        for side in ('train', 'val'):
            annotations = f'annotations/instances_{side}2017.json'
            write_coco(tmp_path / 'data/coco', f'{side}2017', annotations, names)
            write_coco(tmp_path / 'data/birds', 'images', f'{side}.json', ('heron', 'sparrow'))
    else:
        for side, short in (('training', 'train'), ('validation', 'val')):
            root = tmp_path / 'data/ade/ADEChallengeData2016'
            write_masks(root, f'images/{side}', f'annotations/{side}', 151)
            write_masks(tmp_path / 'data/fields', f'images/{short}', f'masks/{short}', 3)
    (config,) = re.findall(r'```python\n(.*?)```', readme(task), re.DOTALL)
    (tmp_path / {'detection': 'my_birds.py', 'segmentation': 'my_fields.py'}[task]).write_text(config)
    from vision_rwkv.backbones import VRWKV

    start = VRWKV(embed_dims=64, depth=4).state_dict()
    torch.save(
        {'state_dict': {f'backbone.{key}': value for key, value in start.items()}}, tmp_path / 'vrwkv_t_in1k_224.pth'
    )
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize('clone', ['detection', 'segmentation'], indirect=True)
def test_commands_run_in_their_order(clone, request):
    task = request.node.callspec.params['clone']
    metric = {'detection': 'coco/bbox_mAP: ', 'segmentation': 'mIoU: '}[task]
    for command in commands(task):
        said = call('bash', '-c', shortened(command, task), cwd=clone, OMP_NUM_THREADS=2)
        if 'init_cfg' in command:
            assert re.search(r'vrwkv_t_in1k_224\.pth: \d+ tensors keep .*level_embed', said.output)
            unused = '2 tensors of the file are not used: backbone.ln1.weight, backbone.ln1.bias'
            assert f'vrwkv_t_in1k_224.pth: {unused}' in said.output
        if '--resume' in command:
            assert re.search(r'resumed epoch: 1|resumed epoch: 0, iter: 2', said.output)
        if 'dist_test' in command:
            assert metric in said.output
    assert (clone / f'work_dirs/digits_{task}/picture.png').stat().st_size > 10000
    (best,) = clone.glob('work_dirs/my_*/best.pth')
    assert torch.load(best, weights_only=False)['meta']['dataset_meta']['classes']


@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_every_kind_of_command_is_there(task):
    scripts = {command.split()[0 if command.startswith('tools') else 1] for command in commands(task)}
    assert scripts == {
        f'tools/{name}' for name in ('dist_train.sh', 'dist_test.sh', 'make_digits.py', 'draw_scenes.py')
    }


@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_links_and_targets_are_there(task):
    text = readme(task)
    links = [link.partition('#')[0] for link in re.findall(r'\]\(([^)]+)\)', text) if '://' not in link]
    assert len(links) >= 8 and all((ROOT / task / link).exists() for link in links)
    targets = re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
    assert set(re.findall(r'`make ([a-z-]+)', text)) <= set(targets)


@pytest.mark.slow
@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_smallest_demo(task, tmp_path):
    """Few scenes, few iterations, two processes: the loss falls, and what is learned beats chance."""
    config = {
        'detection': 'mask_rcnn/mask_rcnn_vrwkv_adapter_digits.py',
        'segmentation': 'digits/upernet_vrwkv_adapter_digits.py',
    }[task]
    config = ROOT / 'configs' / task / config
    short = {
        'detection': ['train_cfg.max_epochs=3', 'train_cfg.val_interval=3', 'param_scheduler.1.end=3'],
        'segmentation': [
            *(f'{key}=240' for key in ('train_cfg.max_iters', 'train_cfg.val_interval', 'param_scheduler.1.end')),
            *('default_hooks.checkpoint.interval=240', 'param_scheduler.0.end=20', 'param_scheduler.1.begin=20'),
        ],
    }[task]
    made = ('--kind', task, '--out', f'data/digits_{task}', '--scenes', 120)
    call(sys.executable, ROOT / 'tools/make_digits.py', *made, cwd=tmp_path)
    options = ('--cfg-options', *short, 'default_hooks.logger.interval=5')
    call(ROOT / 'tools/dist_train.sh', config, 2, '--work-dir', 'work', *options, cwd=tmp_path, OMP_NUM_THREADS=1)
    logged = [
        json.loads(line)
        for log in tmp_path.glob('work/*/vis_data/scalars.json')
        for line in log.read_text().splitlines()
    ]
    losses = [entry['loss'] for entry in logged if 'loss' in entry]
    assert len(losses) >= 9 and np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])

    test = ('--work-dir', 'test', '--out', 'predictions.pkl')
    call(ROOT / 'tools/dist_test.sh', config, 'work/best.pth', 2, *test, cwd=tmp_path, OMP_NUM_THREADS=1)
    bars = {'detection': ['coco/bbox_mAP_50=0.0'], 'segmentation': ['mIoU=8']}[task]  # all background: 7.4
    draw = (ROOT / 'tools/draw_scenes.py', 'predictions.pkl', 'test', 'picture.png')
    classes = ('--classes', f'data/digits_{task}/classes.txt')
    said = call(sys.executable, *draw, *classes, '--at-least', *bars, cwd=tmp_path)
    assert '15 images; ' in said.stdout and (tmp_path / 'picture.png').stat().st_size > 10000
    shutil.rmtree(tmp_path / 'work')
