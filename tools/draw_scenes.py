"""Draw predicted boxes, masks and labels over the images of a detection or segmentation test."""

import argparse
import json
import pickle
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

ROWS, COLUMNS = 4, 6
COLORS = plt.get_cmap('tab20').colors
SURE = 0.5  # what a detection must score to be drawn
SPECK = 30  # pixels; a smaller piece of a class gets no label


def color_of(label: int) -> tuple[float, float, float]:
    """The colour of a class."""
    return COLORS[(2 * label) % len(COLORS) + (2 * label) // len(COLORS) % 2]


def paint(axes, mask: np.ndarray, label: int) -> None:
    """Lay the colour of a class over the pixels of ``mask`` (H, W)."""
    axes.imshow(np.dstack([np.broadcast_to(color_of(label), (*mask.shape, 3)), 0.55 * mask]))


def note(axes, x: float, y: float, text: str, label: int) -> None:
    """A label that can be read on anything."""
    box = {'facecolor': color_of(label), 'edgecolor': 'none', 'pad': 0.8}
    axes.text(x, y, text, fontsize=6, color='white', va='bottom', bbox=box, clip_on=True)


def draw_instances(axes, instances: dict, classes: list[str]) -> None:
    """The boxes, masks and labels of one image that score at least SURE."""
    from pycocotools import mask as coco_mask

    for box, label, score, runs in zip(
        *(instances[key] for key in ('bboxes', 'labels', 'scores', 'masks')), strict=True
    ):
        if score < SURE:
            continue
        left, top, right, bottom = (float(edge) for edge in box)
        number = int(label)
        paint(axes, coco_mask.decode(runs), number)
        axes.add_patch(
            Rectangle((left, top), right - left, bottom - top, fill=False, color=color_of(number), linewidth=1.2)
        )
        note(axes, left, top, f'{classes[number]} {float(score):.0%}', number)


def draw_labels(axes, labels: np.ndarray, classes: list[str]) -> None:
    """The classes of all pixels (H, W) but the first class, each piece with its name."""
    from skimage.measure import label as pieces_of
    from skimage.measure import regionprops

    for number in np.unique(labels[labels > 0]):
        paint(axes, labels == number, int(number))
        for piece in regionprops(pieces_of(labels == number)):
            if piece.area >= SPECK:
                top, left, *_ = piece.bbox
                note(axes, left, top, classes[number], int(number))


def draw(predictions: list[dict], classes: list[str], title: str) -> plt.Figure:
    """The first images in the order of their names."""
    figure, grid = plt.subplots(ROWS, COLUMNS, figsize=(13, 9.2), dpi=110, layout='constrained')
    chosen = sorted(predictions, key=lambda prediction: prediction['img_path'])[: ROWS * COLUMNS]
    for axes, prediction in zip(grid.flat, chosen, strict=False):
        axes.imshow(plt.imread(prediction['img_path']))
        if 'pred_instances' in prediction:
            draw_instances(axes, prediction['pred_instances'], classes)
        else:
            draw_labels(axes, prediction['pred_sem_seg'], classes)
    for axes in grid.flat:
        axes.axis('off')
    figure.suptitle(title)
    return figure


def read_metrics(work_dir: Path) -> dict[str, float]:
    """The figures of the latest test logged in ``work_dir``."""
    logs = sorted(work_dir.glob('*/*.json'))
    if not logs:
        sys.exit(f'draw_scenes.py: error: no test was logged in {work_dir}')
    return json.loads(logs[-1].read_text().splitlines()[-1])


def parse_bar(text: str) -> tuple[str, float]:
    """'coco/bbox_mAP_50=0.6' -> ('coco/bbox_mAP_50', 0.6)."""
    name, _, value = text.partition('=')
    return name, float(value)


def main() -> None:
    """Write the picture; exit status 1 if a figure is below its bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('predictions', type=Path, help='what tools/test.py --out wrote')
    parser.add_argument('work_dir', type=Path, help='the work dir of that test')
    parser.add_argument('picture', type=Path, help='PNG to write')
    parser.add_argument('--classes', type=Path, required=True, help='text file with one class name a line')
    parser.add_argument('--title', default='Predictions')
    parser.add_argument('--at-least', type=parse_bar, nargs='+', default=[], metavar='METRIC=VALUE', help='fail below')
    args = parser.parse_args()

    metrics = read_metrics(args.work_dir)
    with open(args.predictions, 'rb') as file:
        predictions = pickle.load(file)
    reached = ', '.join(f'{name} {metrics[name]:.3f}' for name, _ in args.at_least)
    figure = draw(predictions, args.classes.read_text().split(), f'{args.title}  {reached}'.strip())
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture)
    print(f'{len(predictions)} images; {reached or "no bar"}; picture: {args.picture}')
    below = [f'{name} at least {bar}' for name, bar in args.at_least if not metrics[name] >= bar]
    if below:
        sys.exit(f'draw_scenes.py: error: expected {", ".join(below)}')


if __name__ == '__main__':
    main()
