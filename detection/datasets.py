"""COCO data sets whose annotation file is checked."""

import math
from typing import Any

from mmdet import datasets
from mmdet.registry import DATASETS
from pycocotools import mask as coco_mask

from openmmlab import MAX_PIXELS, DataError


def wrong_with_box(box: Any, width: int, height: int) -> str | None:
    """What is wrong with a COCO box [left, top, width, height] in an image of this size; None if nothing is.

    It may reach over the edge, and be empty: MMDetection leaves empty ones out, and COCO has some.
    """
    if len(box) != 4 or not math.isfinite(sum(box)):
        return 'expected 4 finite numbers'
    if box[2] < 0 or box[3] < 0:
        return 'its width or height is negative'
    if not (-box[2] <= box[0] <= width and -box[3] <= box[1] <= height):
        return f'it lies outside its image of {width} x {height}'
    return wrong_with_polygon([box[0], box[1], box[0] + box[2], box[1] + box[3]], width, height)


def wrong_with_polygon(polygon: list, width: int, height: int) -> str | None:
    """What is wrong with a COCO polygon [x, y, x, y, ...], as pycocotools draws any, however large; or None."""
    if not math.isfinite(sum(polygon)):
        return 'expected finite numbers'
    for places, size in ((polygon[::2], width), (polygon[1::2], height)):
        if places and not -size <= min(places) <= max(places) <= 2 * size:
            return f'it reaches further out of its image of {width} x {height} than that is large'
    return None


def wrong_with_mask(mask: Any, width: int, height: int) -> str | None:
    """What is wrong with a COCO segmentation, polygons or a run-length code; None if nothing is."""
    if isinstance(mask, list):
        return next(filter(None, (wrong_with_polygon(polygon, width, height) for polygon in mask)), None)
    if mask['size'] != [height, width] or width * height > MAX_PIXELS:
        return f'a run-length code of (height, width) {mask["size"]} in an image of {[height, width]}'
    try:
        coco_mask.decode(coco_mask.frPyObjects(mask, height, width) if isinstance(mask['counts'], list) else mask)
    except ValueError as error:
        return str(error)
    return None


@DATASETS.register_module(force=True)
class CocoDataset(datasets.CocoDataset):
    """MMDetection's, in its place: a file that is not what it should be is named, and so are classes it lacks."""

    def parse_data_info(self, raw_data_info: dict[str, Any]) -> dict[str, Any]:
        """Raises ValueError for a box or mask that cannot be: MMDetection drops some silently and trains on others."""
        image = raw_data_info['raw_img_info']
        width, height = image['width'], image['height']
        for annotation in raw_data_info['raw_ann_info']:
            box, mask = annotation['bbox'], annotation.get('segmentation')
            where = f'annotation {annotation.get("id")} of image {image["file_name"]}'
            if wrong := wrong_with_box(box, width, height):
                raise ValueError(f'{where}: box {box}: {wrong}')
            if mask and (wrong := wrong_with_mask(mask, width, height)):
                raise ValueError(f'{where}: segmentation: {wrong}')
        return super().parse_data_info(raw_data_info)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Raises FileNotFoundError or DataError, naming the annotation file."""
        try:
            data = super().load_data_list()
        except FileNotFoundError as error:
            raise FileNotFoundError(f'annotation file not found: {self.ann_file}') from error
        except (ValueError, AssertionError, KeyError, TypeError) as error:  # not JSON; not a dict; a field not there
            what = f'no {error}' if isinstance(error, KeyError) else error
            raise DataError(f'annotation file {self.ann_file}: not in COCO format: {what}') from error
        if len(self.cat_ids) != len(self.metainfo['classes']):
            raise DataError(
                f'annotation file {self.ann_file}: expected the classes {", ".join(self.metainfo["classes"])}, '
                f'found {len(self.cat_ids)} of these {len(self.metainfo["classes"])} (metainfo.classes of the data set)'
            )
        return data
