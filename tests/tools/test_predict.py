"""Predictions on images: the numbers are the toolboxes' own, every picture is there, and what is broken is named."""

import json
import sys

import numpy as np
import pytest
import torch
import untrained
from mmengine.config import Config
from PIL import Image
from pycocotools import mask as coco_mask
from scripts import ROOT, errors_in
from scripts import call as call_script

from tools import predict, predictors
from tools.cli import UserError
from tools.draw_predictions import read_log
from tools.inference import find_images
from vision_rwkv.checkpoints import CheckpointError

SCRIPT = ROOT / 'tools/predict.py'


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    """A checkpoint with the names of its classes."""
    names = tuple(f'digit {number}' for number in range(10))
    path = tmp_path_factory.mktemp('detector') / 'detector.pth'
    return untrained.write(untrained.DETECTION, path, dataset_meta={'classes': names})


@pytest.fixture(scope='module')
def segmenter(tmp_path_factory):
    """A checkpoint without any metadata."""
    return untrained.write(untrained.SEGMENTATION, tmp_path_factory.mktemp('segmenter') / 'segmenter.pth')


def run(monkeypatch, out, *arguments) -> dict:
    """What results.json holds after a run without errors; all pictures are there, and nothing else is left."""
    untrained.call(predict, monkeypatch, *arguments, '--out', out)
    told = json.loads((out / 'results.json').read_text())
    for result in told['results']:
        assert Image.open(out / result['picture']).size[1] >= 300
    assert sum(path.is_file() for path in (out / 'pictures').iterdir()) == len(told['results'])
    assert not list(out.rglob('.*'))
    return told


def test_classification_is_as_accurate_as_tested(trained, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny)
    command = ('tiny.py', 'whole/best.pth', 'data/digits/val')
    told = run(monkeypatch, tmp_path / 'one', *command)
    assert told['unreadable'] == [] and len(told['results']) == 40
    right = [result['classes'][0]['name'] == result['image'].split('/')[-2] for result in told['results']]
    best = max(read_log(trained.work_dir)[1].values())
    assert 100 * np.mean(right) == pytest.approx(best, abs=1e-3)
    for result in told['results']:
        scores = [found['score'] for found in result['classes']]
        assert len(scores) == 5 and scores == sorted(scores, reverse=True) and sum(scores) <= 1.001
    some = run(monkeypatch, tmp_path / 'three', *command[:2], 'data/digits/val/0', '--batch-size', 3)
    assert some['results'] == told['results'][:4]


def test_classification_is_mmpretrains_own(trained, tiny, tmp_path, monkeypatch):
    from mmpretrain import ImageClassificationInferencer

    monkeypatch.chdir(tiny)
    images = sorted(map(str, (tiny / 'data/digits/val/3').iterdir()))
    told = run(monkeypatch, tmp_path, 'tiny.py', 'whole/best.pth', *images)
    classify = ImageClassificationInferencer('tiny.py', 'whole/best.pth', device='cpu')
    for result, theirs in zip(told['results'], classify(images), strict=True):
        first = result['classes'][0]
        assert (first['label'], first['name']) == (theirs['pred_label'], theirs['pred_class'])
        assert first['score'] == pytest.approx(theirs['pred_score'], abs=1e-4)


def test_detection_is_mmdetections_own(detector, photos, tmp_path, monkeypatch):
    from mmdet.apis import DetInferencer

    command = (untrained.DETECTION, detector, photos, '--score', 0.1)
    told = run(monkeypatch, tmp_path, *command)
    detect = DetInferencer(str(untrained.DETECTION), str(detector), device='cpu', show_progress=False)
    assert sum(len(result['instances']) for result in told['results']) > 0
    for result in told['results']:
        theirs = detect(result['image'])['predictions'][0]
        sure = [i for i, score in enumerate(theirs['scores']) if score >= 0.1]
        assert [found['label'] for found in result['instances']] == [theirs['labels'][i] for i in sure]
        width, height = Image.open(result['image']).size
        for found, i in zip(result['instances'], sure, strict=True):
            assert found['name'] == f'digit {found["label"]}'
            assert found['score'] == pytest.approx(theirs['scores'][i], abs=1e-4)
            assert found['box'] == pytest.approx(theirs['bboxes'][i], abs=0.051)
            assert np.array_equal(coco_mask.decode(found['mask']), coco_mask.decode(theirs['masks'][i]))
            assert coco_mask.decode(found['mask']).shape == (height, width)
    none = run(monkeypatch, tmp_path / 'none', *command[:3], '--score', 1)
    assert all(result['instances'] == [] for result in none['results'])


def test_segmentation_is_mmsegmentations_own(segmenter, photos, tmp_path, monkeypatch):
    from mmseg.apis import MMSegInferencer

    told = run(monkeypatch, tmp_path, untrained.SEGMENTATION, segmenter, photos, '--batch-size', 4)
    segment = MMSegInferencer(str(untrained.SEGMENTATION), str(segmenter), device='cpu', show_progress=False)
    names = ['background', *'0123456789']
    for result in told['results']:
        theirs = segment(result['image'])['predictions']
        labels = np.asarray(Image.open(tmp_path / result['labels']))
        assert np.array_equal(labels, theirs)
        shares = {found['name']: found['share'] for found in result['classes']}
        expected = {names[label]: (labels == label).mean() for label in np.unique(labels)}
        assert shares == pytest.approx(expected, abs=1e-4)
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
    palette = [[20 * number, 0, 0] for number in range(11)]
    segment.model.dataset_meta = {'classes': names, 'palette': palette}
    assert segment(result['image'], return_vis=True)['visualization'].shape == (*labels.shape, 3)


def test_what_cannot_be_read_is_named_and_the_rest_is_done(segmenter, photos, tmp_path):
    folder = tmp_path / 'mixed'
    folder.mkdir()
    (folder / 'b.png').write_text('text')
    whole = (photos / 'camera.jpg').read_bytes()
    (folder / 'a.jpg').write_bytes(whole)
    (folder / 'c.jpg').write_bytes(whole[: len(whole) // 2])
    (folder / 'd.png').touch()
    (folder / 'e.jpg').write_bytes(whole)
    (folder / 'notes.txt').write_text('no image')
    command = (sys.executable, SCRIPT, untrained.SEGMENTATION, segmenter, folder, '--out', 'out', '--batch-size', 2)
    said = call_script(*command, cwd=tmp_path, expect=1)
    assert '2 images done' in said.stdout
    told = json.loads((tmp_path / 'out/results.json').read_text())
    assert [result['image'] for result in told['results']] == [f'{folder}/a.jpg', f'{folder}/e.jpg']
    reasons = {broken['image']: broken['reason'] for broken in told['unreadable']}
    assert list(reasons) == [f'{folder}/{name}' for name in ('b.png', 'c.jpg', 'd.png')]
    assert reasons[f'{folder}/b.png'] == 'not an image' and reasons[f'{folder}/d.png'] == 'the file is empty'
    errors = [line for line in errors_in(said.stderr) if line.startswith('predict.py: ')]
    assert errors[:3] == [f'predict.py: image {image}: {reason}' for image, reason in reasons.items()]
    assert errors[3] == 'predict.py: error: 3 of 5 images could not be read' and 'Traceback' not in said.output


def test_nothing_half_written(segmenter, photos, tmp_path, monkeypatch):
    def fail(self, path, **_):
        path.write_bytes(b'half')
        raise KeyboardInterrupt

    monkeypatch.setattr('matplotlib.figure.Figure.savefig', fail)
    with pytest.raises(KeyboardInterrupt):
        untrained.call(predict, monkeypatch, untrained.SEGMENTATION, segmenter, photos, '--out', tmp_path)
    assert [path.name for path in tmp_path.rglob('*') if path.is_file()] == ['camera.png']  # a whole map of labels
    assert np.asarray(Image.open(tmp_path / 'labels/camera.png')).shape == (64, 64)


def fails(monkeypatch, *arguments) -> str:
    with pytest.raises((UserError, CheckpointError)) as error:
        untrained.call(predict, monkeypatch, *arguments)
    return str(error.value)


def test_what_is_refused(segmenter, detector, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'text.pth').write_text('text')
    good = (untrained.SEGMENTATION, segmenter)
    out = ('--out', 'out')
    assert 'config not found: no.py' in fails(monkeypatch, 'no.py', segmenter, photos, *out)
    assert 'checkpoint not found: no.pth' in fails(monkeypatch, untrained.SEGMENTATION, 'no.pth', photos, *out)
    assert 'text.pth: not a checkpoint' in fails(monkeypatch, untrained.SEGMENTATION, 'text.pth', photos, *out)
    message = fails(monkeypatch, untrained.SEGMENTATION, detector, photos, *out)
    assert 'does not fit the model: missing from the file: decode_head' in message
    for name in ('no.png', 'no*.png', 'empty/*'):
        assert f'image not found: {name} (from {tmp_path})' in fails(monkeypatch, *good, photos, name, *out)
    assert 'no images in the folder empty' in fails(monkeypatch, *good, 'empty', *out)
    for device in ('gpu', 'meta', 'cuda:x'):
        assert f'expects cpu, cuda or cuda:N, got {device}' in fails(
            monkeypatch, *good, photos, *out, '--device', device
        )
    assert 'CUDA GPU(s) here' in fails(monkeypatch, *good, photos, *out, '--device', 'cuda:99')
    assert 'at least 1, got 0' in fails(monkeypatch, *good, photos, *out, '--batch-size', 0)
    assert 'between 0 and 1, got 2' in fails(monkeypatch, *good, photos, *out, '--score', 2)
    assert 'required: --out' in fails(monkeypatch, *good, photos)
    masked = untrained.CONFIGS / 'classification/mae/vrwkv_mae_digits.py'
    assert 'has no test_dataloader' in fails(monkeypatch, masked, segmenter, photos, *out)
    other = ('--cfg-options', 'default_scope=mmpose')
    assert 'expected default_scope mmpretrain, mmdet, mmseg' in fails(monkeypatch, *good, photos, *out, *other)
    assert not (tmp_path / 'out').exists()


def test_images_are_found_once_and_in_order(photos, monkeypatch):
    monkeypatch.chdir(photos)
    (photos / 'notes.txt').write_text('no image')
    everything = ['camera.jpg', 'more/coffee.JPEG', 'rocket.png']
    assert list(map(str, find_images(['.']))) == everything
    assert list(map(str, find_images(['rocket.png', '*.jpg', 'rocket.png', '.']))) == [
        'rocket.png',
        'camera.jpg',
        'more/coffee.JPEG',
    ]
    assert list(map(str, find_images(['**/*.JPEG']))) == ['more/coffee.JPEG']


def test_names_of_what_is_written(tmp_path):
    names = predict.names_of([tmp_path / name for name in ('a.png', 'b/A.jpg', 'a_2.png', 'a.jpg')])
    assert list(names.values()) == ['a', 'A_2', 'a_2_2', 'a_3']


def test_batches_hold_one_size():
    prepared = [(None, None, {'inputs': torch.zeros(3, side, 4)}) for side in (4, 4, 4, 8, 8, 4)]
    sides = [[item[2]['inputs'].shape[1] for item in batch] for batch in predict.batches(prepared, 2)]
    assert sides == [[4, 4], [4], [8, 8], [4]]


@pytest.mark.parametrize(
    ('meta', 'classes'),
    [
        ({'dataset_meta': {'classes': ['x', 'y']}, 'CLASSES': ['p', 'q']}, ['x', 'y']),
        ({'CLASSES': ('p', 'q')}, ['p', 'q']),
        ({'dataset_meta': {'classes': ['x', 'y', 'z']}}, ['m', 'n']),  # of another model
        ({}, ['m', 'n']),
        (None, ['m', 'n']),
    ],
)
def test_where_names_come_from(meta, classes):
    from mmengine.registry import init_default_scope

    init_default_scope('mmseg')
    dataset = {'type': 'ADE20KDataset', 'metainfo': {'classes': ('m', 'n')}}
    cfg = Config({'test_dataloader': {'dataset': dataset}})
    found = predictors.class_names(cfg, {'meta': meta}, 2)
    assert found == {'classes': classes}  # ADE20K's palette has another length
    cfg.test_dataloader.dataset.pop('metainfo')
    ade = predictors.class_names(cfg, {'meta': None}, 150)
    assert (ade['classes'][0], ade['palette'][0]) == ('wall', [120, 120, 120])
    assert predictors.class_names(cfg, {}, 7) == {}


@pytest.mark.cuda
def test_on_a_gpu(segmenter, photos, tmp_path, monkeypatch):
    told = [
        run(monkeypatch, tmp_path / device, untrained.SEGMENTATION, segmenter, photos, '--device', device)
        for device in ('cpu', 'cuda')
    ]
    for ours, theirs in zip(*(results['results'] for results in told), strict=True):
        labels = [np.asarray(Image.open(tmp_path / d / r['labels'])) for d, r in (('cpu', ours), ('cuda', theirs))]
        assert (labels[0] == labels[1]).mean() > 0.99
