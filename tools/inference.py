"""What the scripts that run a model on photographs share: finding and reading them, devices, backbones."""

import glob
import os
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor

from openmmlab import DataError, check_image_file
from tools.cli import ConfigParser, UserError
from vision_rwkv.backbones.base import Backbone

# What a folder is searched for; a file named itself may have any name.
ENDINGS = ('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')


class ImageParser(ConfigParser):
    """CONFIG CHECKPOINT IMAGE... (or just one IMAGE) and a device."""

    def __init__(self, description: str, several: bool = True):
        super().__init__(description)
        self.add_argument('checkpoint', help='checkpoint file or URL')
        if several:
            what = 'image file, folder, or pattern such as "shots/*.jpg"'
            self.add_argument('images', nargs='+', metavar='IMAGE', help=what)
        else:
            self.add_argument('image', type=Path, metavar='IMAGE', help='image file')
        self.add_argument('--device', help='cpu, cuda or cuda:N (default: cuda where there is a GPU)')


def find_images(names: list[str]) -> list[Path]:
    """The image files of file names, folders (with all below them) and patterns, each once, sorted within each name.

    Raises UserError for a name without any.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(name)
        if path.is_file():
            paths = [path]
        elif path.is_dir():
            paths = sorted(p for p in path.rglob('*') if p.suffix.lower() in ENDINGS and p.is_file())
        else:
            paths = sorted(p for p in map(Path, glob.glob(name, recursive=True)) if p.is_file())
        if not paths:
            what = f'no images in the folder {name}' if path.is_dir() else f'image not found: {name}'
            raise UserError(f'{what} (from {os.getcwd()})')
        found.update(dict.fromkeys(paths))
    return list(found)


def read_image(path: Path) -> np.ndarray:
    """A picture (H, W, 3) uint8 in OpenCV's order, blue first, upright. Raises UserError that says what is wrong."""
    try:
        check_image_file(str(path))
        image = mmcv.imread(path)
    except DataError as error:
        raise UserError(str(error)) from error
    if image is None:
        raise UserError(f'image {path}: not an image')
    return image


def pick_device(name: str | None) -> torch.device:
    """The device of that name, by default a GPU if there is one. Raises UserError if there is none of that name."""
    try:
        device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
    except RuntimeError:
        device = None
    if device is None or device.type not in ('cpu', 'cuda'):
        raise UserError(f'--device expects cpu, cuda or cuda:N, got {name}')
    count = torch.cuda.device_count()
    if device.type == 'cuda' and (device.index or 0) >= count:
        raise UserError(f'--device {name}: there {"is" if count == 1 else "are"} {count or "no"} CUDA GPU(s) here')
    return device


def build_backbone(cfg: Config) -> Backbone:
    """The backbone of a config with its initial values, to evaluate. Raises UserError if it is none of ours."""
    settings = cfg.get('model', {}).get('backbone')
    if not settings:
        raise UserError(f'{cfg.filename}: it has no model.backbone')
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    backbone = MODELS.build({**settings, 'init_cfg': None})
    if not isinstance(backbone, Backbone):
        raise UserError(f'{cfg.filename}: expected a backbone of Vision-RWKV, got {settings.type}')
    return backbone.eval()


def to_input(cfg: Config, picture: np.ndarray) -> Tensor:
    """A picture (H, W, 3) uint8, blue first -> what the backbone of a config takes, normalised, (1, 3, H, W)."""
    settings = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    x = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
    if settings.get('to_rgb') or settings.get('bgr_to_rgb'):
        x = x.flip(1)
    mean, std = (
        torch.tensor(settings.get(key, usual)).view(1, -1, 1, 1) for key, usual in (('mean', 0.0), ('std', 1.0))
    )
    return (x - mean) / std


def as_tested(cfg: Config, image: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) uint8 as the config's test pipeline resizes and crops it. Raises UserError without one."""
    if not cfg.get('test_dataloader'):
        raise UserError(f'{cfg.filename} has no test_dataloader: nothing says how it wants its images')
    init_default_scope(cfg.default_scope)
    pipeline = cfg.test_dataloader.dataset.pipeline
    wanted = [step for step in pipeline if not step.type.rpartition('.')[2].startswith(('Load', 'Pack'))]
    size = image.shape[:2]
    return Compose(wanted)({'img': image, 'img_shape': size, 'ori_shape': size})['img']
