"""Write scikit-learn's handwritten digits as a data set of image files: 1797 real digits, nothing to download."""

import argparse
import hashlib
import shutil
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIZE = 32  # pixels a side of the pictures written; the originals have 8
MARKER = 'made_by_make_digits.txt'


def split_digits() -> dict[str, list[tuple[str, int, np.ndarray]]]:
    """The digits as {'train': [...], 'val': [...]}, each (name, label, picture (8, 8) uint8); a fifth is 'val'.

    The hash of a picture decides its side: the split is always the same, and equal pictures are never on both.
    """
    data = load_digits()
    split = {'train': [], 'val': []}
    for number, (image, label) in enumerate(zip(data.images, data.target, strict=True)):
        picture = np.round(image * (255 / 16)).astype(np.uint8)
        side = 'val' if hashlib.sha256(picture.tobytes()).digest()[0] < 256 / 5 else 'train'
        split[side].append((f'{number:04d}', int(label), picture))
    return split


def write_classification(folder: Path) -> None:
    """ImageNet's layout: SPLIT/CLASS/NUMBER.png, and classes.txt."""
    for side, digits in split_digits().items():
        for name, label, picture in digits:
            path = folder / side / str(label) / f'{name}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(path)
    (folder / 'classes.txt').write_text(''.join(f'{digit}\n' for digit in range(10)))


# What can be written: name -> function that fills an empty folder.
WRITERS: dict[str, Callable[[Path], None]] = {'classification': write_classification}


@contextmanager
def whole_folder(folder: Path):
    """An empty folder to fill, which becomes ``folder`` at the end if nothing was raised."""
    partial = folder.with_name(f'.{folder.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def make(folder: Path, kind: str) -> bool:
    """Write the data set ``kind`` to ``folder``; False if it is there already. Raises FileExistsError if others' is."""
    marker = folder / MARKER
    if marker.is_file() and marker.read_text().strip() == kind:
        return False
    if folder.exists():
        raise FileExistsError(f'{folder} exists and is no {kind} data set of this tool: remove it or choose another')
    with whole_folder(folder) as partial:
        WRITERS[kind](partial)
        (partial / MARKER).write_text(f'{kind}\n')
    return True


def main() -> None:
    """Write the data set asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=Path('data/digits'), help='folder to write (%(default)s)')
    parser.add_argument('--kind', choices=WRITERS, default='classification', help='data set to write (%(default)s)')
    args = parser.parse_args()
    try:
        new = make(args.out, args.kind)
    except OSError as error:
        sys.exit(f'make_digits.py: error: {error}')
    counts = {side: sum(1 for _ in (args.out / side).rglob('*.png')) for side in ('train', 'val')}
    print(
        f'{args.out}: {counts["train"]} training, {counts["val"]} validation images{"" if new else " (already there)"}'
    )


if __name__ == '__main__':
    main()
