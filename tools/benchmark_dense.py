"""Time training iterations of a detection or segmentation config on random images, and print the peak memory.

No data set and no checkpoint is needed. The published sizes are 800 1333 for detection and 512 512 for segmentation.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.device import get_device  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import MODELS, init_default_scope  # noqa: E402
from mmengine.structures import InstanceData, PixelData  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from tools.cli import check_amp, check_file, run  # noqa: E402

OBJECTS = 10  # in an image
IGNORED = 255


def detection_sample(height: int, width: int, classes: int):
    """Random boxes with rectangular masks."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    corners = torch.rand(OBJECTS, 2) * torch.tensor([0.6 * width, 0.6 * height])
    sizes = (0.05 + 0.3 * torch.rand(OBJECTS, 2)) * torch.tensor([width, height])
    boxes = torch.cat([corners, corners + sizes], 1)
    masks = torch.zeros(OBJECTS, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    sample = DetDataSample(metainfo=metainfo(height, width))
    sample.gt_instances = InstanceData(
        bboxes=boxes, labels=torch.randint(classes, (OBJECTS,)), masks=BitmapMasks(masks.numpy(), height, width)
    )
    return sample


def segmentation_sample(height: int, width: int, classes: int):
    """A random class at every pixel, and some to ignore."""
    from mmseg.structures import SegDataSample

    labels = torch.randint(classes, (1, height, width))
    labels[:, : height // 20] = IGNORED
    sample = SegDataSample(metainfo=metainfo(height, width))
    sample.gt_sem_seg = PixelData(data=labels)
    return sample


def metainfo(height: int, width: int) -> dict:
    """What transforms would tell of an image."""
    shape = (height, width)
    return {'img_shape': shape, 'ori_shape': shape, 'pad_shape': shape, 'scale_factor': (1.0, 1.0)}


def make_batch(scope: str, model: nn.Module, batch: int, height: int, width: int) -> dict:
    """Images and their truth, as a data loader gives them."""
    images: list[Tensor] = [torch.randint(0, 256, (3, height, width), dtype=torch.uint8) for _ in range(batch)]
    if scope == 'mmdet':
        samples = [detection_sample(height, width, model.roi_head.bbox_head.num_classes) for _ in images]
    else:
        samples = [segmentation_sample(height, width, model.decode_head.num_classes) for _ in images]
    return {'inputs': images, 'data_samples': samples}


def main() -> None:
    """Print one row of a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='a config of detection or segmentation')
    parser.add_argument('--size', type=int, nargs=2, default=None, metavar=('H', 'W'), help='default: as published')
    parser.add_argument('--batch', type=int, help="images (default: the config's, per process)")
    parser.add_argument('--iterations', type=int, default=10, help='timed ones (%(default)s), after three to warm up')
    args = parser.parse_args()

    check_file(args.config, 'config')
    cfg = Config.fromfile(args.config)
    init_default_scope(cfg.default_scope)
    check_amp(cfg)
    torch.manual_seed(0)
    device = get_device()
    model = MODELS.build(cfg.model).to(device).train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    height, width = args.size or ((800, 1333) if cfg.default_scope == 'mmdet' else (512, 512))
    batch = args.batch or cfg.train_dataloader.batch_size

    times = []
    for iteration in range(3 + args.iterations):
        data = make_batch(cfg.default_scope, model, batch, height, width)
        start = time.perf_counter()
        losses = model.train_step(data, wrapper)
        if device == 'cuda':
            torch.cuda.synchronize()
        if iteration == 2 and device == 'cuda':
            torch.cuda.reset_peak_memory_stats()
        if iteration >= 3:
            times.append(time.perf_counter() - start)
    memory = f'{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB' if device == 'cuda' else '-'
    name = torch.cuda.get_device_name() if device == 'cuda' else 'CPU'
    print('| config | images | ms an iteration, median (least to most) | peak memory | loss | on |')
    print('|---' * 6 + '|')
    print(
        f'| {Path(args.config).stem} | {batch} x {height} x {width} | {1e3 * statistics.median(times):.0f} '
        f'({1e3 * min(times):.0f} to {1e3 * max(times):.0f}) | {memory} | {losses["loss"].item():.3f} '
        f'| {name}, PyTorch {torch.__version__} |'
    )


if __name__ == '__main__':
    run(main)
