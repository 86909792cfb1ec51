"""Scenes of handwritten digits on cluttered photographs: what make_digits.py writes for detection and segmentation."""

from typing import NamedTuple

import numpy as np
import skimage.data
from PIL import Image, ImageDraw
from skimage.color import gray2rgb

SIDE = 160  # pixels
DIGITS = (4, 7)  # in a scene, at least and at most
HEIGHT = (36, 72)  # of a digit in pixels; log-uniform
STROKE = 0.4  # of the darkest ink: where a digit begins
CONTRAST = 70  # grey levels, at least, by which a digit is brighter than the mean of what it covers
# Photographs that scikit-image ships, divided so that no validation background was seen in training.
PHOTOS = {
    'train': ('astronaut', 'brick', 'camera', 'chelsea', 'coins', 'gravel', 'page', 'retina', 'rocket'),
    'val': ('coffee', 'grass', 'immunohistochemistry', 'moon', 'text'),
}


class Placed(NamedTuple):
    """A digit in a scene: its label, its visible pixels (SIDE, SIDE) bool, and its box x, y, width, height."""

    label: int
    mask: np.ndarray
    box: tuple[int, int, int, int]


class Scene(NamedTuple):
    """A picture (SIDE, SIDE, 3) uint8 and the digits in it; their boxes do not overlap."""

    picture: np.ndarray
    digits: list[Placed]


def photos(side: str) -> list[np.ndarray]:
    """The photographs of 'train' or 'val', each (H, W, 3) uint8."""
    images = [getattr(skimage.data, name)() for name in PHOTOS[side]]
    return [image[..., :3] if image.ndim == 3 else gray2rgb(image) for image in images]


def background(rng: np.random.Generator, photo: np.ndarray) -> Image.Image:
    """A piece of a photograph, darkened, perhaps mirrored or in other colours, with lines and ellipses drawn on it."""
    height, width = photo.shape[:2]
    edge = int(rng.uniform(min(140, height, width), min(400, height, width)))
    top, left = rng.integers(height - edge + 1), rng.integers(width - edge + 1)
    piece = photo[top : top + edge, left : left + edge][:, :: rng.choice([1, -1]), :: rng.choice([1, -1])]
    picture = Image.fromarray(np.ascontiguousarray(piece)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    toned = np.asarray(picture, dtype=float) * rng.uniform(0.3, 0.55)
    picture = Image.fromarray(toned.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(4, 9)):
        color = tuple(int(c) for c in rng.integers(0, 160, 3))
        x0, x1, y0, y1 = (int(c) for c in rng.integers(-10, SIDE + 10, 4))
        if rng.random() < 0.6:
            draw.line((x0, y0, x1, y1), fill=color, width=int(rng.integers(1, 5)))
        else:
            box = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
            draw.ellipse(box, outline=color, width=int(rng.integers(1, 4)))
    return picture


def ink(picture: np.ndarray, height: int) -> np.ndarray:
    """A digit's picture (8, 8) uint8 as opacities in [0, 1], (height, height), cut to what is visible."""
    large = Image.fromarray(picture).resize((height, height), Image.Resampling.BICUBIC)
    opacity = np.asarray(large, dtype=float) / picture.max()
    rows, columns = np.nonzero(opacity > STROKE)
    opacity = opacity[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return ((opacity - STROKE + 0.1) / 0.2).clip(0, 1)  # one half at the edge of the stroke


def color_on(rng: np.random.Generator, covered: np.ndarray) -> np.ndarray:
    """A colour (3,) that is brighter than the pixels (N, 3) it covers."""
    weights = np.array([0.299, 0.587, 0.114])
    mean = (covered @ weights).mean()
    while True:
        color = rng.integers(80, 256, 3)
        if color @ weights - mean > CONTRAST:
            return color


def compose(rng: np.random.Generator, pictures: list[tuple[int, np.ndarray]], photo: np.ndarray) -> Scene:
    """A scene of some of ``pictures``, (label, (8, 8) uint8), on ``photo``."""
    canvas = np.asarray(background(rng, photo), dtype=float)
    taken = np.zeros((SIDE, SIDE), bool)
    placed: list[Placed] = []
    wanted = rng.integers(DIGITS[0], DIGITS[1] + 1)
    for _ in range(100):
        if len(placed) == wanted:
            break
        label, picture = pictures[rng.integers(len(pictures))]
        opacity = ink(picture, int(np.exp(rng.uniform(*np.log(HEIGHT)))))
        h, w = opacity.shape
        top, left = (int(rng.integers(SIDE - edge + 1)) for edge in (h, w))
        place = np.s_[top : top + h, left : left + w]
        if taken[place].any():
            continue
        taken[max(0, top - 2) : top + h + 2, max(0, left - 2) : left + w + 2] = True
        mask = np.zeros((SIDE, SIDE), bool)
        mask[place] = opacity >= 0.5
        color = color_on(rng, canvas[place][opacity >= 0.5])
        canvas[place] += opacity[..., None] * (color - canvas[place])
        placed.append(Placed(label, mask, (left, top, w, h)))
    noisy = canvas + rng.normal(0, 3, canvas.shape)
    return Scene(noisy.clip(0, 255).astype(np.uint8), placed)


def scenes(side: str, count: int, pictures: list[tuple[int, np.ndarray]]):
    """``count`` scenes of 'train' or 'val' from digits (label, (8, 8) uint8) of that side; always the same ones."""
    backgrounds = photos(side)
    for number in range(count):
        rng = np.random.default_rng([list(PHOTOS).index(side), number])
        yield compose(rng, pictures, backgrounds[rng.integers(len(backgrounds))])
