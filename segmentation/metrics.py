"""What tools/test.py --out writes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.evaluator import DumpResults
from mmseg.registry import METRICS

KEPT = ('img_path', 'seg_map_path', 'ori_shape', 'reduce_zero_label')


@METRICS.register_module()
class DumpSegResults(DumpResults):
    """Writes {'img_path', 'seg_map_path', ..., 'pred_sem_seg': (H, W) class numbers} of each image.

    MMEngine's would write the scores of every class at every pixel: hundreds of megabytes an image on ADE20K.
    """

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep what is to be written."""
        for sample in data_samples:
            labels = sample['pred_sem_seg']['data'].squeeze(0).cpu().numpy().astype(np.uint16)
            self.results.append({key: sample[key] for key in KEPT if key in sample} | {'pred_sem_seg': labels})
