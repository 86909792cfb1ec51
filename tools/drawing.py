"""Pictures of predictions: the photograph with what was found in it, and beside it a list of classes."""

import itertools
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tools.draw_scenes import color_of

DPI = 100
LEAST = 480  # pixels of the longer side: smaller photographs are enlarged
PANEL = 2.8  # inches of the list beside a photograph of LEAST; everything grows with the photograph
FONT = 9  # points, likewise
ROW = 0.24  # inches, likewise
LEAST_ROWS = 15  # of a list: room for five long names
BAR = '#1565c0'

Color = tuple[float, float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


class Canvas(NamedTuple):
    """A figure with the photograph, in its own pixels, and room beside it.

    panel: axes measured in rows of text from the top, x from 0 to 1; None if there is no room.
    unit: how much larger than usual everything is; rows: how many rows of text the panel has.
    """

    figure: Figure
    photo: Axes
    panel: Axes | None
    unit: float
    rows: int


def canvas(picture: np.ndarray, panel: bool) -> Canvas:
    """A canvas for a picture (H, W, 3) uint8, red first."""
    height, width = picture.shape[:2]
    scale = max(1.0, LEAST / max(height, width)) / DPI
    w, h = width * scale, height * scale
    unit = max(w, h) * DPI / LEAST
    beside = PANEL * unit if panel else 0.0
    total = max(h, LEAST_ROWS * ROW * unit) if panel else h
    figure = Figure(figsize=(w + beside, total), dpi=DPI, facecolor='white')
    photo = figure.add_axes((0, 1 - h / total, w / (w + beside), h / total))
    photo.imshow(picture, aspect='auto', extent=(0, width, height, 0))
    photo.set_axis_off()
    photo.set(xlim=(0, width), ylim=(height, 0))
    if not panel:
        return Canvas(figure, photo, None, unit, 0)
    rows = int(total / (ROW * unit)) - 1
    axes = figure.add_axes((w / (w + beside), 0, beside / (w + beside), 1))
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(total / (ROW * unit), 0))
    return Canvas(figure, photo, axes, unit, rows)


def draw_scores(picture: np.ndarray, scores: Sequence[tuple[str, float]]) -> Figure:
    """A photograph beside the likeliest classes, (name, probability), as bars."""
    made = canvas(picture, panel=True)
    top = 0.8
    for number, (name, score) in enumerate(scores):
        lines = textwrap.wrap(name, 28, max_lines=2, placeholder=' …') or ['']
        weight = 'bold' if number == 0 else 'normal'
        for line in lines:
            made.panel.text(0.05, top, line, fontsize=FONT * made.unit, weight=weight, va='center')
            top += 0.9
        made.panel.add_patch(Rectangle((0.05, top - 0.3), 0.7, 0.45, color='#e8eaed'))
        made.panel.add_patch(Rectangle((0.05, top - 0.3), 0.7 * score, 0.45, color=BAR))
        made.panel.text(0.78, top - 0.08, f'{score:.1%}', fontsize=FONT * made.unit, va='center')
        top += 1.2
    return made.figure


def draw_instances(picture: np.ndarray, instances: Sequence[dict]) -> Figure:
    """A photograph with boxes, masks and names.

    instances: {'label', 'name', 'score', 'box': left, top, right, bottom, 'mask': (H, W) bool or absent}, best first.
    """
    made = canvas(tinted(picture, instances), panel=False)
    for found in reversed(instances):
        left, top, right, bottom = found['box']
        color, linewidth = color_of(found['label']), 1.3 * made.unit
        made.photo.add_patch(
            Rectangle((left, top), right - left, bottom - top, fill=False, color=color, linewidth=linewidth)
        )
    renderer = FigureCanvasAgg(made.figure).get_renderer()
    pixel = picture.shape[0] / (made.figure.get_figheight() * DPI)  # of the figure, in those of the photograph
    margin = 0.15 * ROW * made.unit * DPI * pixel  # of a label, to all sides
    taken: list[Box] = []
    for found in instances:
        text = made.photo.text(
            0,
            0,
            f'{found["name"]} {found["score"]:.0%}',
            fontsize=FONT * made.unit,
            color='white',
            va='top',
            bbox={
                'facecolor': np.multiply(color_of(found['label']), 0.75),
                'edgecolor': 'none',
                'pad': 0.15 * ROW * 72 * made.unit,
            },
            zorder=3 + found['score'],  # where labels must overlap, the best one is on top
        )
        extent = text.get_window_extent(renderer)
        size = extent.width * pixel + 2 * margin, extent.height * pixel + 2 * margin
        taken.append(place_label(found['box'], size, picture.shape[:2], taken))
        text.set_position((taken[-1][0] + margin, taken[-1][1] + margin))
    return made.figure


def place_label(box: Box, size: tuple[float, float], within: tuple[int, int], taken: list[Box]) -> Box:
    """Where the label (width, height) of a box goes, inside a picture (height, width).

    Above the box where there is room, inside it, or below; at its end that is nearer to the middle of the picture, or
    the other one: the first of these places that overlaps none of ``taken``.
    """
    left, top, right, bottom = box
    width, height = size
    ends = [left, right - width] if left + right <= within[1] else [right - width, left]
    heights = [top - height, top, bottom - height, bottom]
    if top < height:
        heights.remove(top - height)
    places = []
    for x, y in itertools.product(ends, heights):
        x, y = max(0.0, min(x, within[1] - width)), max(0.0, min(y, within[0] - height))
        places.append((x, y, x + width, y + height))
    free = (one for one in places if not any(overlap(one, other) for other in taken))
    return next(free, places[0])


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes share more than an edge."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def tinted(picture: np.ndarray, instances: Sequence[dict]) -> np.ndarray:
    """The picture with the mask of each instance in the colour of its class, better ones over others."""
    mixed = picture.astype(np.float32)
    for found in reversed(instances):
        if 'mask' in found:
            mixed[found['mask']] = 0.5 * picture[found['mask']] + 0.5 * 255 * np.array(color_of(found['label']))
    return mixed.astype(np.uint8)


def draw_segments(picture: np.ndarray, classes: Sequence[tuple[str, Color, float]]) -> Figure:
    """A coloured picture beside the names, colours and shares of the classes in it, largest first."""
    made = canvas(picture, panel=True)
    shown = classes if len(classes) <= made.rows else classes[: made.rows - 1]
    for row, (name, color, share) in enumerate(shown):
        top = row + 0.8
        made.panel.add_patch(
            Rectangle((0.05, top - 0.36), 0.09, 0.72, facecolor=color, edgecolor='#808080', linewidth=0.5 * made.unit)
        )
        short = textwrap.shorten(name, 24, placeholder=' …')
        made.panel.text(0.18, top, short, fontsize=FONT * made.unit, va='center')
        made.panel.text(
            0.97,
            top,
            f'{share:.1%}' if share >= 0.0005 else '< 0.1%',
            fontsize=FONT * made.unit,
            va='center',
            ha='right',
        )
    if len(shown) < len(classes):
        more = f'and {len(classes) - len(shown)} more'
        made.panel.text(0.18, len(shown) + 0.8, more, fontsize=FONT * made.unit, va='center', style='italic')
    return made.figure
