"""Write scikit-learn's handwritten digits as a data set of image files: 1797 real digits, nothing to download.

Kinds: classification (ImageNet's layout), detection (COCO's) and segmentation (ADE20K's); the last two have the same
scenes of several digits each, on photographs that scikit-image ships.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

SIZE = 32  # pixels a side of the pictures written; the originals have 8
SCENES = 800  # to train on; an eighth as many for validation
CLASSES = [str(digit) for digit in range(10)]
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


def write_classification(folder: Path, scenes: int) -> None:
    """ImageNet's layout: SPLIT/CLASS/NUMBER.png, and classes.txt."""
    for side, digits in split_digits().items():
        for name, label, picture in digits:
            path = folder / side / str(label) / f'{name}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(path)
    write_classes(folder, CLASSES)


def write_classes(folder: Path, classes: list[str]) -> None:
    """classes.txt: a name a line."""
    (folder / 'classes.txt').write_text('\n'.join(classes) + '\n')


def make_scenes(scenes: int) -> Iterator[tuple]:
    """(side, number, scene) of all scenes, of the digits and photographs of their side alone."""
    from tools.scenes import scenes as compose_scenes  # needs scikit-image, which classification does without

    for side, digits in split_digits().items():
        count = scenes if side == 'train' else max(1, scenes // 8)
        for number, scene in enumerate(compose_scenes(side, count, [digit[1:] for digit in digits])):
            yield side, number, scene


def write_detection(folder: Path, scenes: int) -> None:
    """COCO's layout: images/SIDE/NUMBER.jpg, and annotations/instances_SIDE.json with boxes and run-length masks."""
    from pycocotools import mask as coco_mask

    categories = [{'id': label + 1, 'name': name} for label, name in enumerate(CLASSES)]
    files = {side: {'images': [], 'annotations': [], 'categories': categories} for side in ('train', 'val')}
    for side, number, scene in make_scenes(scenes):
        name = f'{number:04d}.jpg'
        save_jpeg(scene.picture, folder / 'images' / side / name)
        height, width = scene.picture.shape[:2]
        files[side]['images'].append({'id': number, 'file_name': name, 'height': height, 'width': width})
        annotations = files[side]['annotations']
        for digit in scene.digits:
            runs = coco_mask.encode(np.asfortranarray(digit.mask))
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': number,
                    'category_id': digit.label + 1,
                    'bbox': list(digit.box),
                    'area': int(digit.mask.sum()),
                    'segmentation': {'size': runs['size'], 'counts': runs['counts'].decode()},
                    'iscrowd': 0,
                }
            )
    (folder / 'annotations').mkdir()
    for side, contents in files.items():
        (folder / f'annotations/instances_{side}.json').write_text(json.dumps(contents))
    write_classes(folder, CLASSES)


def write_segmentation(folder: Path, scenes: int) -> None:
    """ADE20K's layout: images/SPLIT/NUMBER.jpg, annotations/SPLIT/NUMBER.png; 1 is background, 2 to 11 the digits."""
    splits = {'train': 'training', 'val': 'validation'}
    for side, number, scene in make_scenes(scenes):
        save_jpeg(scene.picture, folder / 'images' / splits[side] / f'{number:04d}.jpg')
        labels = np.ones(scene.picture.shape[:2], np.uint8)
        for digit in scene.digits:
            labels[digit.mask] = digit.label + 2
        path = folder / 'annotations' / splits[side] / f'{number:04d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels).save(path)
    write_classes(folder, ['background', *CLASSES])


def save_jpeg(picture: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, quality=92)


# What can be written: name -> function that fills an empty folder, and where the images of both sides are.
WRITERS: dict[str, Callable[[Path, int], None]] = {
    'classification': write_classification,
    'detection': write_detection,
    'segmentation': write_segmentation,
}
IMAGES = {
    'classification': ('train', 'val'),
    'detection': ('images/train', 'images/val'),
    'segmentation': ('images/training', 'images/validation'),
}


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


def make(folder: Path, kind: str, scenes: int = SCENES) -> bool:
    """Write the data set ``kind`` to ``folder``; False if it is there already. Raises FileExistsError if others' is."""
    marker = folder / MARKER
    if marker.is_file() and marker.read_text().strip() == kind:
        return False
    if folder.exists():
        raise FileExistsError(f'{folder} exists and is no {kind} data set of this tool: remove it or choose another')
    with whole_folder(folder) as partial:
        WRITERS[kind](partial, scenes)
        (partial / MARKER).write_text(f'{kind}\n')
    return True


def main() -> None:
    """Write the data set asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=Path('data/digits'), help='folder to write (%(default)s)')
    parser.add_argument('--kind', choices=WRITERS, default='classification', help='data set to write (%(default)s)')
    parser.add_argument(
        '--scenes', type=int, default=SCENES, help='training scenes (%(default)s), not for classification'
    )
    args = parser.parse_args()
    if args.scenes < 1:
        sys.exit(f'make_digits.py: error: expected at least one scene, got {args.scenes}')
    try:
        new = make(args.out, args.kind, args.scenes)
    except OSError as error:
        sys.exit(f'make_digits.py: error: {error}')
    train, val = (sum(path.is_file() for path in (args.out / side).rglob('*')) for side in IMAGES[args.kind])
    print(f'{args.out}: {train} training, {val} validation images{"" if new else " (already there)"}')


if __name__ == '__main__':
    main()
