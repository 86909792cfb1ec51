"""Test every published model whose checkpoint and data are here: a table of published, reproduced, difference."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402

from tools import zoo  # noqa: E402
from tools.cli import UserError, check_data, run  # noqa: E402

# Published name -> (name in the log, what makes it percent).
METRICS = {
    'Top 1 Accuracy': ('accuracy/top1', 1),
    'box AP': ('coco/bbox_mAP', 100),
    'mask AP': ('coco/segm_mAP', 100),
    'mIoU': ('mIoU', 1),
}


class Settings(NamedTuple):
    """checkpoints: folder with the released files. download: get those that are missing. work_dir: of the tests."""

    checkpoints: Path
    download: bool
    gpus: int
    work_dir: Path


def obstacle(row: zoo.Row, settings: Settings) -> str | None:
    """Why a row cannot be tested here, or None."""
    if not row.metrics:
        return 'no published figure'
    if not (zoo.ROOT / row.config).exists():
        return 'no config'
    if not settings.download and not checkpoint_of(row, settings).is_file():
        return f'no checkpoint {checkpoint_of(row, settings)}'
    try:
        check_data(Config.fromfile(zoo.ROOT / row.config).test_dataloader)
    except UserError as error:
        return str(error)
    return None


def checkpoint_of(row: zoo.Row, settings: Settings) -> Path:
    return settings.checkpoints / row.weights.rpartition('/')[2]


def test(row: zoo.Row, settings: Settings) -> dict[str, float]:
    """Run tools/dist_test.sh; its metrics under their published names, in percent. Raises UserError if it fails."""
    local, work_dir = checkpoint_of(row, settings), settings.work_dir / row.name
    known = set(work_dir.glob('*/*.json'))
    command = [zoo.ROOT / 'tools/dist_test.sh', zoo.ROOT / row.config, local if local.is_file() else row.weights]
    command += [str(settings.gpus), '--work-dir', work_dir]
    if subprocess.run(command, env={**os.environ, 'PYTHON': sys.executable}).returncode:
        raise UserError(f'testing {row.name} failed')
    (log,) = set(work_dir.glob('*/*.json')) - known
    found = json.loads(log.read_text().splitlines()[-1])
    return {name: found[key] * factor for name, (key, factor) in METRICS.items() if name in row.metrics}


def table(rows: list[zoo.Row], results: dict[str, dict[str, float] | str]) -> str:
    """The results, or why there are none, by the rows' names, as a Markdown table."""
    lines = ['| model | metric | published | reproduced | difference |', '| --- | --- | --- | --- | --- |']
    for row in rows:
        result = results[row.name]
        if isinstance(result, str):
            lines.append(f'| {row.name} | | | {result} | |')
            continue
        for name, value in result.items():
            published = row.metrics[name]
            lines.append(f'| {row.name} | {name} | {published:.1f} | {value:.2f} | {value - published:+.2f} |')
    return '\n'.join(lines) + '\n'


def reproduce(rows: list[zoo.Row], settings: Settings, out: Path) -> None:
    """Test ``rows`` and write the table to ``out``, anew after each. Raises UserError at the end if a test failed."""
    results: dict[str, dict[str, float] | str] = {row.name: 'not yet' for row in rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for row in rows:
        reason = obstacle(row, settings)
        try:
            results[row.name] = f'not tested: {reason}' if reason else test(row, settings)
        except UserError as error:
            failed.append(str(error))
            results[row.name] = 'failed'
        partial = out.with_name(f'.{out.name}.partial')
        partial.write_text(table(rows, results))
        os.replace(partial, out)
    print(out.read_text(), end='')
    if failed:
        raise UserError('; '.join(failed))


def main() -> None:
    """Reproduce."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('names', nargs='*', help='which models; all if none is named')
    parser.add_argument('--gpus', type=int, default=1, help='processes to test with (%(default)s)')
    parser.add_argument('--checkpoints', type=Path, help="folder with the released files (default: torch.hub's cache)")
    parser.add_argument('--download', action='store_true', help='download the files that are missing')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/zoo'), help='where logs go (%(default)s)')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/zoo/table.md'), help='the table (%(default)s)')
    args = parser.parse_args()
    rows = zoo.read_all()
    if unknown := set(args.names) - {row.name for row in rows}:
        raise UserError(f'no such model: {", ".join(sorted(unknown))}; known: {", ".join(row.name for row in rows)}')
    rows = [row for row in rows if not args.names or row.name in args.names]
    checkpoints = args.checkpoints or Path(torch.hub.get_dir(), 'checkpoints')
    reproduce(rows, Settings(checkpoints, args.download, args.gpus, args.work_dir), args.out)


if __name__ == '__main__':
    run(main)
