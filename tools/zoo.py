"""The model zoo: configs/TASK/metafile.yml holds it, this writes the tables of READMEs and of docs/zoo.md from it."""

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
TASKS = ('classification', 'detection', 'segmentation')
READMES = ('README.md', 'docs/zoo.md', *(f'{task}/README.md' for task in TASKS))
TABLE = re.compile(r'(<!-- zoo: (\w+) -->\n).*?(<!-- end of zoo -->\n)', re.DOTALL)


class Row(NamedTuple):
    """A published model.

    name, alias: of its config, and of the paper.
    config: path from the repository's root.
    weights: URL of the released file.
    height, width: of the images that ``flops`` are for.
    params, flops: published; None if not. For dense tasks, of the backbone.
    metrics: published figures by name, in percent.
    """

    task: str
    name: str
    alias: str
    config: str
    weights: str
    height: int
    width: int
    params: int | None
    flops: int | None
    metrics: dict[str, float]


def read(task: str) -> list[Row]:
    """The rows of configs/``task``/metafile.yml, in its order."""
    rows = []
    for model in yaml.safe_load((ROOT / 'configs' / task / 'metafile.yml').read_text())['Models']:
        data = model['Metadata']
        metrics = {name: value for result in model.get('Results', ()) for name, value in result['Metrics'].items()}
        rows.append(
            Row(
                task,
                model['Name'],
                model['Alias'],
                model['Config'],
                model['Weights'],
                *data['Resolution'],
                data.get('Parameters'),
                data.get('FLOPs'),
                metrics,
            )
        )
    return rows


def read_all() -> list[Row]:
    """The rows of all tasks."""
    return [row for task in TASKS for row in read(task)]


def table(task: str, up: str = '') -> str:
    """The rows of a task as a Markdown table; ``up`` leads from the README's folder to the root ('' or '../')."""
    rows = read(task)
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    titles = ['model', 'size', 'params', 'FLOPs', *(name.replace('Top 1 Accuracy', 'top-1') for name in metrics)]
    titles += ['config', 'weights']
    lines = [titles, ['---'] * len(titles)]
    for row in rows:
        config = Path(row.config).name
        lines.append(
            [
                row.alias,
                str(row.height) if row.height == row.width else f'{row.height}x{row.width}',
                f'{row.params / 1e6:.1f}M' if row.params else '',
                f'{row.flops / 1e9:.1f}G' if row.flops else '',
                *(f'{row.metrics[name]:.1f}' if name in row.metrics else '' for name in metrics),
                f'[{config}]({up}{row.config})' if (ROOT / row.config).exists() else config,
                f'[{row.weights.rpartition("/")[2]}]({row.weights})',
            ]
        )
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def fill(text: str, up: str = '') -> str:
    """A README's text with each table between `<!-- zoo: TASK -->` and `<!-- end of zoo -->` made anew."""
    return TABLE.sub(lambda found: found[1] + '\n' + table(found[2], up) + '\n' + found[3], text)


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='write nothing; fail if a table is not up to date')
    args = parser.parse_args()
    stale = []
    for name in READMES:
        path = ROOT / name
        text = path.read_text() if path.exists() else ''
        if (new := fill(text, '../' * name.count('/'))) != text:
            stale.append(name)
            if not args.check:
                path.write_text(new)
    if stale and args.check:
        sys.exit(f'zoo.py: error: {", ".join(stale)} not up to date: run python tools/zoo.py')
    print(f'{len(read_all())} models; {"written: " + ", ".join(stale) if stale else "all tables are up to date"}')


if __name__ == '__main__':
    main()
