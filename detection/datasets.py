"""COCO data sets whose annotation file is checked."""

from typing import Any

from mmdet import datasets
from mmdet.registry import DATASETS


@DATASETS.register_module(force=True)
class CocoDataset(datasets.CocoDataset):
    """MMDetection's, in its place: a file that is not what it should be is named, and so are classes it lacks."""

    def load_data_list(self) -> list[dict[str, Any]]:
        """Raises FileNotFoundError or ValueError, naming the annotation file."""
        try:
            data = super().load_data_list()
        except FileNotFoundError as error:
            raise FileNotFoundError(f'annotation file not found: {self.ann_file}') from error
        except (ValueError, AssertionError, KeyError) as error:  # not JSON; not a dict; an entry without a field
            what = f'no {error}' if isinstance(error, KeyError) else error
            raise ValueError(f'annotation file {self.ann_file}: not in COCO format: {what}') from error
        if len(self.cat_ids) != len(self.metainfo['classes']):
            raise ValueError(
                f'annotation file {self.ann_file}: expected the classes {", ".join(self.metainfo["classes"])}, '
                f'found {len(self.cat_ids)} of these {len(self.metainfo["classes"])} (metainfo.classes of the data set)'
            )
        return data
