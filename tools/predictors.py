"""The three tasks on photographs: OpenMMLab's inferencers, and what becomes of their results."""

import copy
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner.checkpoint import CheckpointLoader
from PIL import Image
from torch import nn

from openmmlab import fit_and_tell
from tools import drawing
from tools.cli import UserError
from tools.files import whole_file

TOP = 5  # classes told of a classified image
OPACITY = 0.55  # of the colours of a segmented image


def class_names(cfg: Config, contents: dict, count: int) -> dict[str, list]:
    """Classes and palette as the checkpoint has them, or else the config's data set; {} where neither has ``count``."""
    meta = contents.get('meta') or {}
    dataset = cfg.test_dataloader.dataset
    with DATASETS.switch_scope_and_registry(None) as registry:
        known = getattr(registry.get(dataset.type), 'METAINFO', {})
    sources = [
        meta.get('dataset_meta') or {},
        {'classes': meta.get('CLASSES'), 'palette': meta.get('PALETTE')},  # OpenMMLab's names before 2.0
        {**known, **(dataset.get('metainfo') or {})},
    ]
    for source in sources:
        lists = {key: source.get(key) for key in ('classes', 'palette')}
        found = {key: list(x) for key, x in lists.items() if isinstance(x, (list, tuple)) and len(x) == count}
        if 'classes' in found:
            return found
    return {}


class Predictor(ABC):
    """A checkpoint of one task, ready to predict.

    Args:
        cfg: a config of the task.
        checkpoint: file or URL; every tensor must have its place.
        device: where to run.
        score: what a detection must score to count.

    Raises:
        CheckpointError: the checkpoint cannot be read or does not fit.
    """

    def __init__(self, cfg: Config, checkpoint: str, device: torch.device, score: float):
        init_default_scope(cfg.default_scope)
        contents = CheckpointLoader.load_checkpoint(checkpoint, 'cpu')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # that there are no weights: they follow
            self.inferencer = self._make(copy.deepcopy(cfg), device)
        model = self.inferencer.model
        model.load_state_dict(fit_and_tell(contents, model, checkpoint, start=False).tensors, strict=False)
        count = self._count(model)
        meta = class_names(cfg, contents, count)
        self.classes = [str(name) for name in meta.get('classes', range(count))]
        self.palette = meta.get('palette')
        self.score = score

    @staticmethod
    @abstractmethod
    def _make(cfg: Config, device: torch.device) -> Any:
        """The toolbox's inferencer, without weights."""

    @staticmethod
    @abstractmethod
    def _count(model: Any) -> int:
        """The number of classes."""

    def prepare(self, image: np.ndarray) -> dict:
        """A picture (H, W, 3) uint8, blue first -> what the config's test pipeline makes of it."""
        return self.inferencer.pipeline(image)

    def predict(self, batch: list[dict]) -> list:
        """Prepared pictures of one size -> the toolbox's data samples, on the CPU."""
        return [sample.cpu() for sample in self.inferencer.forward(self.inferencer.collate_fn(batch))]

    @abstractmethod
    def write(self, image: np.ndarray, sample: Any, name: str, out: Path) -> dict:
        """Draw out/pictures/NAME.png; what is to be told of the image, for JSON."""

    def named(self, label: int) -> dict[str, Any]:
        """A class by number and name."""
        return {'label': int(label), 'name': self.classes[label]}


class Classifier(Predictor):
    """Image classification with MMPretrain."""

    @staticmethod
    def _make(cfg, device):
        from mmpretrain import ImageClassificationInferencer

        inferencer = ImageClassificationInferencer(cfg, pretrained=False, device=device)
        inferencer.collate_fn = default_collate
        return inferencer

    @staticmethod
    def _count(model):
        return model.head.num_classes

    def prepare(self, image):
        """As Predictor."""
        return self.inferencer.pipeline({'img': image, 'img_shape': image.shape[:2], 'ori_shape': image.shape[:2]})

    def write(self, image, sample, name, out):
        """As Predictor; {'classes': the likeliest}."""
        scores, labels = sample.pred_score.topk(min(TOP, len(self.classes)))
        top = [self.named(i) | {'score': round(s, 4)} for i, s in zip(labels.tolist(), scores.tolist(), strict=True)]
        figure = drawing.draw_scores(image[..., ::-1], [(found['name'], found['score']) for found in top])
        return {'picture': save(figure, out, name), 'classes': top}


class Detector(Predictor):
    """Detection and instance segmentation with MMDetection."""

    @staticmethod
    def _make(cfg, device):
        from mmdet.apis import DetInferencer

        return DetInferencer(cfg, device=str(device), show_progress=False)

    @staticmethod
    def _count(model):
        head = model.roi_head.bbox_head if hasattr(model, 'roi_head') else model.bbox_head
        return (head[-1] if isinstance(head, nn.ModuleList) else head).num_classes

    def write(self, image, sample, name, out):
        """As Predictor; {'instances': boxes in pixels, and masks in COCO's run-length code, best first}."""
        found = sample.pred_instances
        found = found[found.scores >= self.score]
        sample.pred_instances = found = found[found.scores.argsort(descending=True)]
        result = self.inferencer.pred2dict(sample)
        instances = [
            self.named(label) | {'score': round(score, 4), 'box': [round(edge, 1) for edge in box]}
            for label, score, box in zip(result['labels'], result['scores'], result['bboxes'], strict=True)
        ]
        drawn = instances
        if 'masks' in result:
            drawn = [x | {'mask': mask} for x, mask in zip(instances, found.masks.numpy().astype(bool), strict=True)]
            instances = [x | {'mask': runs} for x, runs in zip(instances, result['masks'], strict=True)]
        figure = drawing.draw_instances(image[..., ::-1], drawn)
        return {'picture': save(figure, out, name), 'instances': instances}


class Segmenter(Predictor):
    """Semantic segmentation with MMSegmentation."""

    @staticmethod
    def _make(cfg, device):
        from mmseg.apis import MMSegInferencer

        return MMSegInferencer(cfg, device=str(device), show_progress=False)

    @staticmethod
    def _count(model):
        return model.decode_head.num_classes

    def write(self, image, sample, name, out):
        """As Predictor, and out/labels/NAME.png with the class of each pixel; {'classes': the share of each there}."""
        labels = sample.pred_sem_seg.data[0].numpy()
        pixels = np.bincount(labels.flat, minlength=len(self.classes))
        present = [int(label) for label in np.argsort(-pixels, kind='stable') if pixels[label]]
        shares = [self.named(label) | {'share': round(pixels[label] / labels.size, 4)} for label in present]
        colors = np.array(self.palette or [np.multiply(drawing.color_of(i), 255) for i in range(len(self.classes))])
        picture = (1 - OPACITY) * image[..., ::-1] + OPACITY * colors[labels]
        figure = drawing.draw_segments(
            picture.astype(np.uint8),
            [(x['name'], tuple(colors[x['label']] / 255), x['share']) for x in shares],
        )
        written = f'labels/{name}.png'
        with whole_file(out / written) as path:
            Image.fromarray(labels.astype(np.uint8 if len(self.classes) <= 256 else np.uint16)).save(path)
        return {'picture': save(figure, out, name), 'labels': written, 'classes': shares}


def save(figure: Figure, out: Path, name: str) -> str:
    """Write pictures/NAME.png below ``out``; its path from there."""
    written = f'pictures/{name}.png'
    with whole_file(out / written) as path:
        figure.savefig(path)
    return written


PREDICTORS = {'mmpretrain': Classifier, 'mmdet': Detector, 'mmseg': Segmenter}


def make_predictor(cfg: Config, checkpoint: str, device: torch.device, score: float) -> Predictor:
    """The predictor of a config's task. Raises UserError where the config has none, CheckpointError as it does."""
    if cfg.get('default_scope') not in PREDICTORS:
        raise UserError(
            f'{cfg.filename}: expected default_scope {", ".join(PREDICTORS)}, got {cfg.get("default_scope")}'
        )
    if not cfg.get('test_dataloader'):
        raise UserError(f'{cfg.filename} has no test_dataloader: nothing says how it wants its images')
    return PREDICTORS[cfg.default_scope](cfg, checkpoint, device, score)
