"""Pictures of predictions: nothing is cut off, whatever the photograph's shape, and what is said is right."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from tools import drawing

SHAPES = [(300, 451), (60, 900), (900, 60), (16, 16), (1500, 1400)]
LONG = 'great grey owl, great gray owl, Strix nebulosa, and what else is in the list'


def texts(figure) -> list[str]:
    """All that is written, none of it beyond the edges of the figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    found = [text for axes in figure.axes for text in axes.texts]
    for text in found:
        box = (text.get_bbox_patch() or text).get_window_extent(canvas.get_renderer())
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text.get_text()
    return [text.get_text() for text in found]


@pytest.mark.parametrize('shape', SHAPES)
def test_scores(shape):
    scores = [(LONG, 0.83), (LONG, 0.1), ('cat', 0.05), (LONG, 0.01), (LONG, 0.0)]
    figure = drawing.draw_scores(np.zeros((*shape, 3), np.uint8), scores)
    said = texts(figure)
    assert said[:3] == ['great grey owl, great gray', 'owl, Strix nebulosa, and …', '83.0%']
    assert said[said.index('cat') + 1] == '5.0%' and sum('%' in text for text in said) == 5
    bars = [patch.get_width() for patch in figure.axes[1].patches]
    assert np.divide(bars[1::2], bars[0]) == pytest.approx([0.83, 0.1, 0.05, 0.01, 0])


def instances(height: int, width: int) -> list[dict]:
    """One in each corner, and a large one."""
    boxes = [(0.1, 0.1, 0.9, 0.9), (0, 0, 0.2, 0.2), (0.8, 0, 1, 0.2), (0, 0.8, 0.2, 1), (0.8, 0.8, 1, 1)]
    found = []
    for label, (left, top, right, bottom) in enumerate(boxes):
        box = [left * width, top * height, right * width, bottom * height]
        mask = np.zeros((height, width), bool)
        mask[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = True
        found.append({'label': label, 'name': 'cat', 'score': 0.9 - label / 10, 'box': box, 'mask': mask})
    return found


@pytest.mark.parametrize('shape', [shape for shape in SHAPES if min(shape) > 60 or max(shape) < 60])
def test_instances(shape):
    found = instances(*shape)
    figure = drawing.draw_instances(np.zeros((*shape, 3), np.uint8), found)
    assert texts(figure) == ['cat 90%', 'cat 80%', 'cat 70%', 'cat 60%', 'cat 50%']
    orders = [text.get_zorder() for text in figure.axes[0].texts]
    assert orders == sorted(orders, reverse=True)  # the best one on top
    assert figure.axes[0].patches[-1].get_width() == pytest.approx(0.8 * shape[1])
    assert figure.get_size_inches().max() * drawing.DPI == pytest.approx(max(*shape, drawing.LEAST))


def test_labels_of_boxes_in_one_place_do_not_cover_each_other():
    boxes = [(40, 30, 120, 130), (41, 31, 119, 131), (40, 32, 121, 129), (42, 30, 120, 130), (100, 0, 160, 40)]
    found = [{'label': i, 'name': 'cat', 'score': 0.9 - i / 10, 'box': box} for i, box in enumerate(boxes)]
    figure = drawing.draw_instances(np.zeros((160, 160, 3), np.uint8), found)
    assert len(texts(figure)) == 5
    drawn = [text.get_bbox_patch().get_window_extent() for text in figure.axes[0].texts]
    for number, one in enumerate(drawn):
        for other in drawn[:number]:
            shared = one.intersection(one, other)
            assert shared is None or min(shared.width, shared.height) <= 1
    tops = [figure.axes[0].transData.inverted().transform((box.x0, box.y0))[1] for box in drawn]
    assert tops[0] == pytest.approx(30, abs=0.5)  # the best one where it would be alone: on its box
    crowd = drawing.draw_instances(np.zeros((160, 160, 3), np.uint8), 12 * found[:1])
    assert len(texts(crowd)) == 12  # more than there is room for: inside the picture all the same


def test_masks_tint_what_they_cover():
    picture = np.full((20, 20, 3), 100, np.uint8)
    found = instances(20, 20)[1:]
    tinted = drawing.tinted(picture, found)
    assert (tinted[5:15, 5:15] == 100).all()
    for one in found:
        expected = 50 + 127.5 * np.array(drawing.color_of(one['label']))
        assert np.abs(tinted[one['mask']] - expected).max() <= 1
    assert (drawing.tinted(picture, [{'label': 0}]) == 100).all()  # without masks


@pytest.mark.parametrize('shape', SHAPES)
def test_segments(shape):
    classes = [(LONG if i % 2 else f'class {i}', (0.5, 0.5, i / 150), 1 / 150) for i in range(149)]
    figure = drawing.draw_segments(np.zeros((*shape, 3), np.uint8), [*classes, ('speck', (1, 0, 0), 1e-5)])
    said = texts(figure)
    shown = len(figure.axes[1].patches)
    assert shown >= 12 and said[-1] == f'and {150 - shown} more' and len(said) == 2 * shown + 1
    assert said[:4] == ['class 0', '0.7%', 'great grey owl, great …', '0.7%']
    few = drawing.draw_segments(np.zeros((*shape, 3), np.uint8), [('sky', (0, 0, 1), 1.0), ('speck', (1, 0, 0), 1e-5)])
    assert texts(few) == ['sky', '100.0%', 'speck', '< 0.1%']
    assert figure.axes[1].patches[1].get_facecolor()[:3] == classes[1][1]
