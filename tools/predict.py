"""Predict on photographs with any config and checkpoint: a picture of each, and one JSON file of all results.

DIR/pictures/NAME.png: the photograph with its likeliest classes, its boxes and masks, or its coloured segments.
DIR/labels/NAME.png (segmentation): the class number of each pixel. DIR/results.json: everything in numbers.
An image that cannot be read is named at the end, and the rest is done; the exit status is then 1.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402

from tools.cli import UserError, check_file, read_config, run  # noqa: E402
from tools.files import whole_file  # noqa: E402
from tools.inference import ImageParser, find_images, pick_device, read_image  # noqa: E402
from tools.predictors import Predictor, make_predictor  # noqa: E402

Prepared = tuple[Path, np.ndarray, dict]


def parse_args():
    """The command line. Raises UserError."""
    parser = ImageParser(__doc__)
    parser.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder to write to')
    parser.add_argument('--batch-size', type=int, default=1, metavar='N', help='images at a time (%(default)s)')
    parser.add_argument('--score', type=float, default=0.3, help='what a detection must score to count (%(default)s)')
    args = parser.parse_args()
    if args.batch_size < 1:
        raise UserError(f'--batch-size must be at least 1, got {args.batch_size}')
    if not 0 <= args.score <= 1:
        raise UserError(f'--score must be between 0 and 1, got {args.score}')
    return args


def names_of(images: list[Path]) -> dict[Path, str]:
    """A name for what is written of each image: its own without the suffix, numbered where another has it already."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in images:
        name, number = path.stem, 1
        while name.lower() in taken:  # some file systems do not tell A from a
            number += 1
            name = f'{path.stem}_{number}'
        taken.add(name.lower())
        names[path] = name
    return names


def prepare(images: Iterable[Path], predictor: Predictor, unreadable: list[dict]) -> Iterator[Prepared]:
    """The images that can be read, with what the model takes; the others go to ``unreadable``."""
    for path in images:
        try:
            image = read_image(path)
            yield path, image, predictor.prepare(image)
        except (UserError, ValueError, AssertionError, cv2.error) as error:  # the last ones from the pipeline
            unreadable.append({'image': str(path), 'reason': str(error).removeprefix(f'image {path}: ')})


def batches(prepared: Iterable[Prepared], size: int) -> Iterator[list[Prepared]]:
    """Up to ``size`` at a time, as long as they are of one size for the model: so none is padded for another's sake."""
    batch: list[Prepared] = []
    for item in prepared:
        if batch and (len(batch) == size or item[2]['inputs'].shape != batch[0][2]['inputs'].shape):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def main() -> None:
    """Predict; exit status 1 if an image could not be read."""
    args = parse_args()
    cfg = read_config(args)
    check_file(args.checkpoint, 'checkpoint')
    images, device = find_images(args.images), pick_device(args.device)
    predictor = make_predictor(cfg, args.checkpoint, device, args.score)

    names, results, unreadable = names_of(images), [], []
    bar = track(images, description='Predicting', console=Console(stderr=True))
    for batch in batches(prepare(bar, predictor, unreadable), args.batch_size):
        samples = predictor.predict([data for _, _, data in batch])
        for (path, image, _), sample in zip(batch, samples, strict=True):
            results.append({'image': str(path)} | predictor.write(image, sample, names[path], args.out))

    told = {'config': args.config, 'checkpoint': args.checkpoint, 'results': results, 'unreadable': unreadable}
    with whole_file(args.out / 'results.json') as path:
        path.write_text(json.dumps(told, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    print(f'{len(results)} images done: {args.out}/results.json, {args.out}/pictures')
    for broken in unreadable:
        print(f'predict.py: image {broken["image"]}: {broken["reason"]}', file=sys.stderr)
    if unreadable:
        sys.exit(f'predict.py: error: {len(unreadable)} of {len(images)} images could not be read')


if __name__ == '__main__':
    run(main)
