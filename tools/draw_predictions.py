"""Draw a training curve beside tested images and their predictions, right and wrong ones marked."""

import argparse
import json
import pickle
import sys
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

GREEN, RED, BLUE = '#2e7d32', '#c62828', '#1565c0'
ROWS, COLUMNS = 5, 8


def read_log(work_dir: Path) -> tuple[dict, dict]:
    """({iteration: loss}, {epoch: top-1}) of all runs logged in ``work_dir``, later ones over earlier ones."""
    losses, accuracies = {}, {}
    for log in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for entry in map(json.loads, log.read_text().splitlines()):
            if 'loss' in entry:
                losses[entry['step']] = entry['loss']
            elif 'accuracy/top1' in entry:
                accuracies[entry['step']] = entry['accuracy/top1']
    return losses, accuracies


def choose(predictions: list[dict]) -> list[dict]:
    """ROWS x COLUMNS predictions: every wrong one that fits in a third of it, the rest right ones, evenly picked."""
    wrong = [p for p in predictions if not is_right(p)][: ROWS * COLUMNS // 3]
    right = sorted((p for p in predictions if is_right(p)), key=lambda p: Path(p['img_path']).name)
    places = ROWS * COLUMNS - len(wrong)
    return right[:: max(1, len(right) // places)][:places] + wrong


def is_right(prediction: dict) -> bool:
    """Whether the predicted label is the true one."""
    return int(prediction['pred_label']) == int(prediction['gt_label'])


def draw_images(figure, predictions: list[dict], classes: list[str]) -> None:
    """One small picture for each prediction."""
    for axes, prediction in zip(figure.subplots(ROWS, COLUMNS).flat, choose(predictions), strict=False):
        axes.imshow(plt.imread(prediction['img_path']), cmap='gray')
        label, truth = int(prediction['pred_label']), int(prediction['gt_label'])
        color = GREEN if label == truth else RED
        note = f'{classes[label]}  {float(prediction["pred_score"][label]):.0%}'
        axes.set_title(note if label == truth else f'{note}  is {classes[truth]}', color=color, fontsize=9, pad=3)
    figure.suptitle('prediction and its confidence; green is right, red is wrong', fontsize=10)
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(visible=bool(axes.images), linewidth=2, edgecolor=axes.title.get_color())


def draw_curve(figure, losses: dict, accuracies: dict) -> None:
    """Loss above, held-out accuracy below."""
    top, bottom = figure.subplots(2, 1)
    top.plot(list(losses), list(losses.values()), color=BLUE, linewidth=1.2)
    top.set(xlabel='iteration', title='training loss')
    errors = {epoch: 100 - value for epoch, value in accuracies.items()}
    bottom.plot(list(errors), list(errors.values()), color=BLUE, linewidth=1.2, marker='.', markersize=4)
    if errors:
        best = min(errors, key=errors.get)
        bottom.plot(best, errors[best], 'o', color=GREEN, label=f'best: epoch {best}')
        bottom.legend(frameon=False)
    bottom.set(xlabel='epoch', title='held-out error (%)')
    bottom.set_yscale('symlog', linthresh=0.25)  # logarithmic, but with a place for no error at all
    bottom.set_ylim(bottom=-0.02)
    bottom.yaxis.set_major_formatter('{x:g}')
    bottom.yaxis.set_minor_formatter('')
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)


def main() -> None:
    """Write the picture; exit status 1 if the accuracy is below --at-least."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('predictions', type=Path, help='what tools/test.py --out wrote')
    parser.add_argument('work_dir', type=Path, help='where the training wrote its logs')
    parser.add_argument('picture', type=Path, help='PNG to write')
    parser.add_argument('--classes', type=Path, required=True, help='text file with one class name a line')
    parser.add_argument('--title', default='Predictions')
    parser.add_argument('--at-least', type=float, default=0, metavar='PERCENT', help='fail below this top-1 accuracy')
    args = parser.parse_args()

    with open(args.predictions, 'rb') as file:
        predictions = pickle.load(file)
    right = sum(map(is_right, predictions))
    accuracy = 100 * right / len(predictions)

    figure = plt.figure(figsize=(14, 6.4), layout='constrained', dpi=110)
    images, curve = figure.subfigures(1, 2, width_ratios=[2.4, 1], wspace=0.04)
    figure.suptitle(f'{args.title}: {right} of {len(predictions)} held-out images right ({accuracy:.2f} %)')
    draw_images(images, predictions, args.classes.read_text().split())
    draw_curve(curve, *read_log(args.work_dir))
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture)

    print(f'top-1 {accuracy:.2f} % ({right} of {len(predictions)}); picture: {args.picture}')
    if accuracy < args.at_least:
        sys.exit(f'draw_predictions.py: error: expected at least {args.at_least} %')


if __name__ == '__main__':
    main()
