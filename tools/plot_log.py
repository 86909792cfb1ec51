"""Curves of one or more runs, from what MMEngine logs: loss, learning rate and validation metrics, as a PNG."""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

from matplotlib.figure import Figure  # noqa: E402

from tools.cli import UserError, run  # noqa: E402
from tools.files import png, whole_file  # noqa: E402

# What is drawn, as far as it is logged, where no names are given.
USUAL = ('loss', 'base_lr', 'accuracy/top1', 'coco/bbox_mAP', 'coco/segm_mAP', 'mIoU')
COLUMNS = 3


class Curves(NamedTuple):
    """What a run logged: {name: {step: value}}; ``by_epoch``: the steps of metrics are epochs, not iterations."""

    training: dict[str, dict[int, float]]
    metrics: dict[str, dict[int, float]]
    by_epoch: bool


def find_logs(run: Path) -> list[Path]:
    """The scalars.json of a run, in the order of time: one each time that it was resumed. Raises UserError if none."""
    logs = (
        [run]
        if run.is_file()
        else sorted(run.glob('*/vis_data/scalars.json')) or sorted(run.glob('vis_data/scalars.json'))
    )
    if not logs:
        raise UserError(f'{run}: neither a scalars.json nor the work dir of a run that logged one')
    return logs


def read_curves(run: Path) -> Curves:
    """All a run logged; of what was done again after a resume, the later. Raises UserError if it cannot be read."""
    training, metrics, by_epoch = {}, {}, False
    for log in find_logs(run):
        lines = log.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                step = entry.pop('step')
            except (ValueError, KeyError, AttributeError) as error:
                if number == len(lines):
                    break  # cut off when the run was killed
                raise UserError(f'{log}, line {number}: expected what MMEngine logs, got {line[:60]!r}') from error
            by_epoch = by_epoch or 'epoch' in entry
            part = training if 'iter' in entry else metrics
            for name, value in entry.items():
                if isinstance(value, (int, float)):
                    part.setdefault(name, {})[step] = value
    return Curves(training, metrics, by_epoch)


def choose(runs: dict[str, Curves], wanted: list[str] | None) -> list[str]:
    """What to draw. Raises UserError for a name that no run logged, or where nothing was logged."""
    logged = dict.fromkeys(
        name for curves in runs.values() for part in (curves.training, curves.metrics) for name in part
    )
    for name in wanted or ():
        if name not in logged:
            raise UserError(f'--keys: {name} was not logged; there are {", ".join(logged) or "none"}')
    chosen = wanted or [name for name in USUAL if name in logged]
    if not chosen:
        raise UserError(f'nothing to draw: none of {", ".join(USUAL)} was logged')
    return chosen


def draw(runs: dict[str, Curves], names: list[str]) -> Figure:
    """A panel for each name, a line for each run that logged it."""
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    legend = 0.25 * len(runs) + 0.1 if len(runs) > 1 else 0
    figure = Figure(figsize=(4.4 * columns, 3.1 * rows + legend), dpi=110, layout='constrained')
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for name, axes in zip(names, panels, strict=False):
        units = set()
        for number, curves in enumerate(runs.values()):
            part = curves.training if name in curves.training else curves.metrics
            steps = sorted(part.get(name, ()))
            if steps:
                units.add('epoch' if part is curves.metrics and curves.by_epoch else 'iteration')
            marker = 'o' if len(steps) < 60 and part is curves.metrics else ''
            values = [part[name][step] for step in steps]
            axes.plot(steps, values, color=f'C{number}', marker=marker, markersize=3, linewidth=1.3)
        axes.set(title=name, xlabel=' or '.join(sorted(units)))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    for axes in panels:
        axes.set_visible(False)
    if legend:
        lines = [figure.axes[0].lines[number] for number in range(len(runs))]
        figure.legend(lines, list(runs), loc='outside lower center', frameon=False)
    return figure


def main() -> None:
    """Read, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('runs', type=Path, nargs='+', metavar='RUN', help='work dir of a run, or its scalars.json')
    parser.add_argument('--out', type=png, required=True, metavar='FILE.png', help='picture to write')
    parser.add_argument('--keys', nargs='+', metavar='NAME', help='what to draw (default: loss, lr, main metrics)')
    args = parser.parse_args()
    runs = {str(path): read_curves(path) for path in args.runs}
    names = choose(runs, args.keys)
    with whole_file(args.out) as path:
        draw(runs, names).savefig(path)
    print(f'{", ".join(names)} of {len(runs)} run(s); picture: {args.out}')


if __name__ == '__main__':
    run(main)
