"""Effective receptive field of a backbone, before and after training, as a heat map and as numbers.

How much each pixel of the input contributes to the centre of the last map: the positive part of the gradient, averaged
over images, as in RepLKNet (arXiv 2203.06717) and the Vision-RWKV paper. A high-contribution area ratio is that of the
smallest square around the centre that holds a given part of all contributions, on their logarithmic scale.
"""

import copy
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

import mmcv  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.colors import LogNorm  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from torch import Tensor  # noqa: E402

from tools.cli import UserError, check_file, read_config, run  # noqa: E402
from tools.files import png, whole_file  # noqa: E402
from tools.inference import ImageParser, build_backbone, find_images, pick_device, read_image, to_input  # noqa: E402
from vision_rwkv.backbones.base import Backbone  # noqa: E402
from vision_rwkv.checkpoints import load  # noqa: E402

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)  # RepLKNet's
SEED = 0  # of the initial weights
FAINT = 0.1  # the part of all pixels that is as good as black in the picture


def contribution(backbone: Backbone, x: Tensor) -> Tensor:
    """How much each pixel of an image (1, 3, H, W) contributes to the centre of the last map: (H, W), none negative.

    Raises UserError for a backbone that returns no maps.
    """
    x = x.requires_grad_()
    last = backbone(x)[-1]
    last = last[0] if isinstance(last, (list, tuple)) else last  # beside a class token
    if last.ndim != 4:
        raise UserError(f'expected a backbone that returns maps, got {type(backbone).__name__}')
    centre = last[0, :, last.shape[2] // 2, last.shape[3] // 2]
    (gradient,) = torch.autograd.grad(centre.relu().sum(), x)
    return gradient[0].relu().sum(0)


def area_ratios(scores: np.ndarray) -> list[tuple[int, float]]:
    """(side in pixels, part of the input) of the square that holds more than each of THRESHOLDS of scores (S, S)."""
    size = len(scores)
    away = np.abs(np.arange(size) - size // 2)
    rings = np.maximum(away[:, None], away)  # the square of side 2 n + 1 is that of rings 0 to n
    held = np.bincount(rings.flat, weights=scores.flat).cumsum()
    sides = [min(size, 2 * int(np.argmax(held > t * held[-1])) + 1) for t in THRESHOLDS]
    return [(side, (side / size) ** 2) for side in sides]


def draw(fields: dict[str, np.ndarray], size: int, title: str) -> Figure:
    """One heat map for each of ``fields``, scores (S, S) from 0 to 1, with the squares of `area_ratios`."""
    figure = Figure(figsize=(5.4 * len(fields) + 0.7, 5.9), dpi=110, layout='compressed')
    faint = min(np.quantile(scores[scores > 0], FAINT) for scores in fields.values())
    norm = LogNorm(np.clip(faint, 1e-8, 0.1), 1, clip=True)
    for axes, (name, scores) in zip(figure.subplots(1, len(fields)), fields.items(), strict=True):
        image = axes.imshow(scores, cmap='inferno', norm=norm, extent=(0, size, size, 0))
        ratios = area_ratios(scores)
        for side, _ in ratios:
            first, last = max(0, size // 2 - side // 2), min(size, size // 2 + side // 2 + 1)
            edge = {'fill': False, 'color': 'white', 'linewidth': 0.9, 'alpha': 0.8, 'clip_on': False}
            axes.add_patch(Rectangle((first, first), last - first, last - first, **edge))
        held = ', '.join(f'{t:.0%} in {100 * ratio:.3g}%' for t, (_, ratio) in zip(THRESHOLDS, ratios, strict=True))
        axes.set_title(f'{name}: {held}', fontsize=9)
        ticks = [0, size // 4, size // 2, 3 * size // 4, size]
        axes.set(xticks=ticks, yticks=ticks, xlabel=f'input: {size} × {size} pixels')
    figure.colorbar(image, ax=figure.axes, label='contribution, 1 for the largest')
    figure.suptitle(f'{title}\nhow much of all contributions in how much of the input (white squares)', fontsize=11)
    return figure


def table(ratios: dict[str, Sequence[tuple[int, float]]]) -> str:
    """The area ratios of each field, a line each."""
    lines = [f'{"holds":<8}' + ''.join(f'{t:>10.0%}' for t in THRESHOLDS)]
    lines += [f'{name:<8}' + ''.join(f'{ratio:>10.2%}' for _, ratio in row) for name, row in ratios.items()]
    return '\n'.join(lines)


def measure(backbone: Backbone, inputs: Iterable[Tensor], device: torch.device) -> np.ndarray:
    """The scores (S, S) from 0 to 1, averaged over ``inputs``. Raises UserError if the output depends on no pixel."""
    backbone.to(device)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for x in inputs:
        total, count = total + contribution(backbone, x.to(device)).cpu(), count + 1
    scores = np.log10(1 + total.numpy() / count)
    if not np.isfinite(scores).all() or not scores.any():
        raise UserError('the centre of the last map has no finite gradient other than 0')
    return scores / scores.max()


def parse_args():
    """The command line. Raises UserError."""
    parser = ImageParser(__doc__)
    parser.add_argument('--out', type=png, required=True, metavar='FILE.png', help='picture; FILE.json goes beside it')
    parser.add_argument('--size', type=int, default=1024, help="the input's side in pixels (%(default)s, the paper's)")
    args = parser.parse_args()
    if args.size < 1:
        raise UserError(f'--size must be at least 1, got {args.size}')
    return args


def main() -> None:
    """Measure, print, draw."""
    args = parse_args()
    cfg = read_config(args)
    check_file(args.checkpoint, 'checkpoint')
    paths, device = find_images(args.images), pick_device(args.device)
    torch.manual_seed(SEED)
    backbones = {'before': build_backbone(cfg)}
    backbones['after'] = copy.deepcopy(backbones['before'])
    load(backbones['after'], args.checkpoint)
    size = (args.size, args.size)
    images = [mmcv.imresize(read_image(path), size, interpolation='bicubic') for path in paths]
    fields = {}
    for name, backbone in backbones.items():
        bar = track(images, description=name, console=Console(stderr=True))
        fields[name] = measure(backbone, (to_input(cfg, image) for image in bar), device)

    ratios = {name: area_ratios(scores) for name, scores in fields.items()}
    told = {'config': args.config, 'checkpoint': args.checkpoint, 'size': args.size, 'images': list(map(str, paths))}
    for name, row in ratios.items():
        told[name] = [
            {'holds': t, 'side': side, 'ratio': round(ratio, 6)}
            for t, (side, ratio) in zip(THRESHOLDS, row, strict=True)
        ]
    with whole_file(args.out.with_suffix('.json')) as path:
        path.write_text(json.dumps(told, indent=1) + '\n')
    with whole_file(args.out) as path:
        draw(fields, args.size, f'Effective receptive field of {Path(args.config).stem}').savefig(path)
    print(f'high-contribution area ratios, {len(images)} images of {args.size} x {args.size} pixels')
    print(f'{table(ratios)}\npicture: {args.out}')


if __name__ == '__main__':
    run(main)
