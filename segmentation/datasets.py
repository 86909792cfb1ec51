"""Data sets and masks that are checked, in place of MMSegmentation's of the same names."""

from pathlib import Path
from typing import Any

import numpy as np
from mmseg import datasets
from mmseg.datasets import transforms
from mmseg.registry import DATASETS, TRANSFORMS
from PIL import UnidentifiedImageError

from openmmlab import MAX_PIXELS, DataError, check_image_file

IGNORED = 255


class Checked:
    """A data set that must have images, and tells the transforms how many classes there are."""

    def load_data_list(self) -> list[dict[str, Any]]:
        """Raises FileNotFoundError where there is no image."""
        data = super().load_data_list()
        if not data:
            raise FileNotFoundError(f'no *{self.img_suffix} in {self.data_prefix.get("img_path")}')
        return data

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """With 'num_classes', where the classes are known."""
        info = super().get_data_info(idx)
        if self.metainfo.get('classes') is not None:
            info['num_classes'] = len(self.metainfo['classes'])
        return info


@DATASETS.register_module(force=True)
class BaseSegDataset(Checked, datasets.BaseSegDataset):
    """A folder of images and one of masks; metainfo=dict(classes=[...]) names the classes."""


@DATASETS.register_module(force=True)
class ADE20KDataset(Checked, datasets.ADE20KDataset):
    """ADE20K."""


@TRANSFORMS.register_module(force=True)
class LoadAnnotations(transforms.LoadAnnotations):
    """Loads the mask; one that is broken or has an index that is no class is an error that names the file.

    max_pixels: a larger mask is refused before it is decoded.
    """

    def __init__(self, *args: Any, max_pixels: int = MAX_PIXELS, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.max_pixels = max_pixels

    def _load_seg_map(self, results: dict[str, Any]) -> None:
        path = results['seg_map_path']
        if Path(path).is_file():  # and not in some remote storage
            check_image_file(path, self.max_pixels)
        try:
            super()._load_seg_map(results)
        except UnidentifiedImageError as error:
            raise DataError(f'mask {path}: not an image') from error
        mask = results['gt_seg_map']
        if mask.ndim != 2:
            raise DataError(f'mask {path}: expected one class index for each pixel, got an array {mask.shape}')
        counts = np.bincount(mask.ravel(), minlength=256)
        counts[IGNORED] = 0
        classes = results.get('num_classes', 256)
        if counts[classes:].any():
            unknown = int(np.flatnonzero(counts)[-1]) + bool(self.reduce_zero_label)
            raise DataError(
                f'mask {path}: index {unknown} is no class; expected {int(self.reduce_zero_label)} to '
                f'{classes - 1 + bool(self.reduce_zero_label)}, or {self._ignored()} to ignore a pixel'
            )

    def _ignored(self) -> str:
        return '0 or 255' if self.reduce_zero_label else '255'
