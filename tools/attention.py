"""The weight that a token gives to every other in each layer, drawn over the photograph; exact, by definition.

VRWKV: y_t is a mean of v whose weights, a softmax over the tokens, sum to 1 in each channel; drawn is their plain mean
over the channels. VRWKV6: y_t is a sum of v whose coefficients, one a head and token, may be negative and sum to
anything, and the norm that follows takes away their scale; drawn is each one's share of all absolute values, averaged
over the heads. In both cases the weights drawn sum to 1.
"""

import sys
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib import colormaps  # noqa: E402
from matplotlib.cm import ScalarMappable  # noqa: E402
from matplotlib.colors import LogNorm  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from tools.cli import UserError, check_file, read_config, run  # noqa: E402
from tools.files import png, whole_file  # noqa: E402
from tools.inference import ImageParser, as_tested, build_backbone, pick_device, read_image, to_input  # noqa: E402
from vision_rwkv.backbones.base import Backbone  # noqa: E402
from vision_rwkv.backbones.blocks import Block  # noqa: E402
from vision_rwkv.checkpoints import load  # noqa: E402

COLUMNS = 5
COLORS = 'RdYlBu_r'


def bi_wkv_weights(w: Tensor, u: Tensor, k: Tensor, token: int) -> Tensor:
    """Weights (T,) of all tokens in Bi-WKV's output at ``token``: w, u (C,), k (T, C); see the head of this file."""
    distance = (torch.arange(len(k), device=k.device) - token).abs()[:, None]
    exponent = torch.where(distance == 0, u, -(distance - 1) * w) + k
    return exponent.softmax(0).mean(1)


def wkv6_weights(r: Tensor, k: Tensor, w: Tensor, u: Tensor, token: int) -> Tensor:
    """Weights (T,) of all tokens in WKV6's output at ``token``: r, k, w (T, H, N), u (H, N); see there."""
    index = torch.arange(len(k), device=k.device)[:, None, None]
    total = w.cumsum(0)
    before = total - w
    between = torch.where(index < token, before[token] - total, before - total[token])  # sums of the log decay
    decay = torch.where(index == token, u, between.exp())
    score = (r[token] * k * decay).sum(2).abs()
    return (score / score.sum(0)).mean(1)


class Recorder(TorchDispatchMode):
    """While it is entered, keeps what the two operators are given, call by call: the layers in their order."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, tuple[Tensor, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in ('vision_rwkv::bi_wkv', 'vision_rwkv::wkv6'):
            self.calls.append((name.partition('::')[2], args))
        return func(*args, **(kwargs or {}))


def layer_weights(name: str, args: tuple[Tensor, ...], token: int) -> Tensor:
    """Weights (T,) in float64 from the arguments of a call of an operator with a batch of one."""
    args = [x.double() for x in args]
    if name == 'bi_wkv':
        w, u, k, _ = args
        return bi_wkv_weights(w, u, k[0], token)
    r, k, _, w, u = args
    return wkv6_weights(r[0], k[0], w[0], u, token)


@torch.no_grad()
def token_weights(backbone: Backbone, x: Tensor, token: tuple[int, int] | None) -> tuple[np.ndarray, tuple[int, int]]:
    """The weights of every layer, (layers, h, w), for ``token`` at (row, column), or the central one, and which it is.

    x (1, 3, H, W). A class token's weight is left out. Raises UserError for a token outside the map.
    """
    grids: list[tuple[int, int]] = []
    handles = [backbone.patch_embed.register_forward_hook(lambda module, inputs, output: grids.append(output[1]))]
    # A block calls its modules if one of them has a hook, and the two operators where there may be a gradient.
    # Otherwise both are part of larger operators.
    handles += [
        block.att.register_forward_hook(lambda *_: None) for block in backbone.modules() if isinstance(block, Block)
    ]
    with Recorder() as recorder, torch.enable_grad():
        backbone(x)
    for handle in handles:
        handle.remove()
    (h, w) = grids[0]
    row, column = token or (h // 2, w // 2)
    if not (0 <= row < h and 0 <= column < w):
        raise UserError(f'--token expects a row from 0 to {h - 1} and a column from 0 to {w - 1}, got {row} {column}')
    weights = torch.stack([layer_weights(*call, row * w + column) for call in recorder.calls])
    if weights.shape[1] < h * w:
        raise UserError(f'expected a backbone that keeps all tokens, got {type(backbone).__name__}')
    return weights[:, : h * w].view(-1, h, w).cpu().numpy(), (row, column)


def reach(weights: np.ndarray, token: tuple[int, int]) -> float:
    """The mean distance in tokens, over weights (h, w), from ``token`` to what it looks at."""
    rows, columns = np.indices(weights.shape)
    return float((np.hypot(rows - token[0], columns - token[1]) * weights).sum() / weights.sum())


def shade(picture: np.ndarray, relative: np.ndarray, norm: LogNorm, patch: int) -> np.ndarray:
    """The colours of relative weights (h, w), as bright as the picture (H, W, 3) uint8 is there; (H, W, 3), 0 to 1."""
    height, width = picture.shape[:2]
    colors = colormaps[COLORS](norm(relative))[..., :3].repeat(patch, 0).repeat(patch, 1)[:height, :width]
    brightness = picture @ np.array([0.299, 0.587, 0.114]) / 255
    return colors * (0.5 + 0.5 * brightness[..., None])


def draw(picture: np.ndarray, weights: np.ndarray, token: tuple[int, int], patch: int, title: str) -> Figure:
    """The picture (H, W, 3) uint8, red first, with the token marked; then on it each layer of weights (layers, h, w).

    Colours, the same in all layers, say how much more or less than alike (1 / tokens) a weight is.
    """
    height, width = picture.shape[:2]
    columns = min(COLUMNS, len(weights) + 1)
    rows = -(-(len(weights) + 1) // columns)
    side = 2.5 * min(1, width / height)
    figure = Figure(
        figsize=(side * columns + 1, (side * height / width + 0.3) * rows + 0.5), dpi=110, layout='compressed'
    )
    relative = np.maximum(weights * weights[0].size, np.finfo(float).tiny)
    limit = float(np.exp(np.quantile(np.abs(np.log(relative)), 0.995)).clip(2, 100))
    norm = LogNorm(1 / limit, limit, clip=True)
    for number, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if number > len(weights):
            axes.set_visible(False)
            continue
        axes.imshow(shade(picture, relative[number - 1], norm, patch) if number else picture)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f'layer {number}' if number else 'the image', fontsize=9, pad=3)
        corner = (token[1] * patch - 0.5, token[0] * patch - 0.5)
        axes.add_patch(Rectangle(corner, patch, patch, fill=False, color='lime', linewidth=1.3))
    bar = figure.colorbar(ScalarMappable(norm, COLORS), ax=figure.axes, label='relative weight', extend='both')
    ticks = [t for t in (0.01, 0.03, 0.1, 0.3, 0.5, 1, 2, 3, 10, 30, 100) if 1 / limit <= t <= limit]
    bar.set_ticks(ticks, labels=[f'{t:g}' for t in ticks], minor=False)
    bar.minorticks_off()
    figure.suptitle(f'{title}\n1: where all tokens weigh alike', fontsize=10)
    return figure


def parse_args():
    """The command line. Raises UserError."""
    parser = ImageParser(__doc__, several=False)
    parser.add_argument('--out', type=png, required=True, metavar='FILE.png', help='picture to write')
    parser.add_argument('--token', type=int, nargs=2, metavar=('ROW', 'COLUMN'), help='from 0 (default: the centre)')
    return parser.parse_args()


def main() -> None:
    """Compute, print, draw."""
    args = parse_args()
    cfg = read_config(args)
    check_file(args.checkpoint, 'checkpoint')
    device = pick_device(args.device)
    picture = as_tested(cfg, read_image(args.image))
    backbone = build_backbone(cfg)
    load(backbone, args.checkpoint)
    weights, token = token_weights(backbone.to(device), to_input(cfg, picture).to(device), args.token)

    title = f'{Path(args.config).stem}, {args.image.name}: weights of token {token[0]}, {token[1]} (marked)'
    with whole_file(args.out) as path:
        draw(picture[..., ::-1], weights, token, backbone.patch_embed.patch_size, title).savefig(path)
    print(
        f'token {token[0]}, {token[1]} of {weights.shape[1]} x {weights.shape[2]}\n'
        'layer   on itself   mean distance (tokens)'
    )
    for number, layer in enumerate(weights, 1):
        print(f'{number:>5}{layer[token]:>12.2%}{reach(layer, token):>25.2f}')
    print(f'picture: {args.out}')


if __name__ == '__main__':
    run(main)
