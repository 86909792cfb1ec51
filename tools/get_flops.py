"""Parameters and multiply-adds of a config's model, counted as in the paper, beside the published figures.

Of classifiers the whole model counts, of dense models the backbone.
"""

import argparse
import sys
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

from mmengine.config import Config, DictAction  # noqa: E402
from mmengine.registry import MODELS, init_default_scope  # noqa: E402

from tools import zoo  # noqa: E402
from tools.cli import UserError, run  # noqa: E402
from vision_rwkv.flops import Cost, measure  # noqa: E402

ROUNDING = 0.06  # million parameters: published with one decimal, 93.646 as 93.7
LIMITS = {'VRWKV6': 0.04, 'adapter': 0.015}  # how far published FLOPs are off; those of VRWKV are as counted


def measure_config(cfg: Config, height: int, width: int) -> Cost:
    """What the model of a config costs for an image of this size."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if cfg.model.type == 'ImageClassifier':
        return measure(lambda: MODELS.build(cfg.model), height, width, lambda model, x: model(x, mode='tensor'))
    return measure(lambda: MODELS.build(cfg.model.backbone), height, width)


def is_as_published(row: zoo.Row, cost: Cost) -> bool:
    """Whether the counted figures are the published ones, as near as these are known to be."""
    limit = next((limit for word, limit in LIMITS.items() if word in row.alias), None)
    if limit is None:
        same = round(cost.flops / 1e8) == round(row.flops / 1e8)  # to the published decimal
    else:
        same = abs(cost.flops / row.flops - 1) <= limit
    return same and abs(cost.params - row.params) / 1e6 <= ROUNDING


def line(title: str, counted: int, published: int | None, unit: float, letter: str) -> str:
    """One figure: counted, published, difference."""
    text = f'{title:<8}{counted / unit:>10.2f}{letter}'
    if published:
        text += f'   published {published / unit:.1f}{letter}, difference {100 * (counted / published - 1):+.1f} %'
    return text


def report(name: str, cost: Cost, row: zoo.Row | None, height: int, width: int) -> str:
    """All figures of one model."""
    at_size = row is not None and (row.height, row.width) == (height, width)
    lines = [
        f'{name} at {height}x{width}',
        line('params', cost.params, row.params if row else None, 1e6, 'M'),
        line('FLOPs', cost.flops, row.flops if row and at_size else None, 1e9, 'G'),
    ]
    if row and row.flops and not at_size:
        lines[-1] += f'   (published for {row.height}x{row.width}: {row.flops / 1e9:.1f}G)'
    return '\n'.join(lines)


def measure_zoo(rows: list[zoo.Row]) -> None:
    """Report the models of ``rows`` whose configs are here. Raises UserError if one is not as published."""
    wrong = []
    for row in rows:
        path = zoo.ROOT / row.config
        if not row.params:
            continue
        if not path.exists():
            print(f'{row.config}: not here')
            continue
        cost = measure_config(Config.fromfile(path), row.height, row.width)
        print(report(row.name, cost, row, row.height, row.width))
        if not is_as_published(row, cost):
            wrong.append(row.name)
    if wrong:
        raise UserError(f'not as published: {", ".join(wrong)}')


def main() -> None:
    """Count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', nargs='?', help='config file')
    parser.add_argument('--shape', nargs=2, type=int, default=(224, 224), metavar=('H', 'W'), help='image size')
    parser.add_argument('--zoo', action='store_true', help='all published models instead, each at its size')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE')
    args = parser.parse_args()
    if args.zoo:
        measure_zoo(zoo.read_all())
        return
    if not args.config or not Path(args.config).is_file():
        raise UserError(f'expected a config file, got {args.config}')
    if min(args.shape) < 1:
        raise UserError(f'--shape must be positive, got {args.shape[0]} {args.shape[1]}')
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options)
    path = Path(args.config).resolve()
    row = next((row for row in zoo.read_all() if zoo.ROOT / row.config == path and not args.cfg_options), None)
    print(report(args.config, measure_config(cfg, *args.shape), row, *args.shape))


if __name__ == '__main__':
    run(main)
