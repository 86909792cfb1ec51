"""Does a checkpoint help? Trains from one and from scratch, equally long, on handwritten digits.

python tests/tools/transfer.py labels 0 1 2    learn digits 0 to 4, then 5 to 9, with seeds 0, 1, 2
python tests/tools/transfer.py masked 0 1 2    learn to fill in masked patches, then the ten digits
"""

import sys
import tempfile
from pathlib import Path

from scripts import ROOT, call

sys.path.insert(0, str(ROOT))

from tools.draw_predictions import read_log  # noqa: E402

CLASSIFIER = f"""
_base_ = ['{ROOT}/configs/classification/vrwkv/{{config}}.py']
model = dict(head=dict(num_classes={{classes}}))
data_preprocessor = dict(num_classes={{classes}})
train_dataloader = dict(dataset=dict(data_root='{{data}}'))
val_dataloader = dict(dataset=dict(data_root='{{data}}'))
test_dataloader = val_dataloader
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=2e-5, by_epoch=True, begin=1, end={{epochs}}, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs={{epochs}})
"""


def write_halves(digits: Path, folder: Path) -> None:
    """The data set as low (digits 0 to 4) and high (5 to 9), by links."""
    for label in range(10):
        for side in ('train', 'val'):
            link = folder / ('low' if label < 5 else 'high') / side / str(label)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(digits / side / str(label))


def train(folder: Path, name: str, config: str, seed: int, load_from: Path | None = None) -> Path:
    """Train ``config`` (its text) in ``folder``; returns the work dir."""
    (folder / f'{name}.py').write_text(config)
    options = ('--cfg-options', f'load_from={load_from}') if load_from else ()
    command = (sys.executable, ROOT / 'tools/train.py', f'{name}.py', '--seed', seed, '--work-dir', name, *options)
    call(*command, cwd=folder, OMP_NUM_THREADS=2)
    return folder / name


def accuracy(work_dir: Path) -> float:
    """Top-1 at the end of a run."""
    accuracies = read_log(work_dir)[1]
    return accuracies[max(accuracies)]


def labels(folder: Path, digits: Path, seed: int, first: int, then: int) -> tuple[float, float]:
    """Top-1 on digits 5 to 9 after ``then`` epochs: from a model of ``first`` epochs on 0 to 4, and from scratch."""
    write_halves(digits, folder)
    fields = {'config': 'vrwkv_digits', 'classes': 5}
    source = train(folder, 'source', CLASSIFIER.format(data='low', epochs=first, **fields), seed)
    target = CLASSIFIER.format(data='high', epochs=then, **fields)
    tuned = train(folder, 'tuned', target, seed, source / f'epoch_{first}.pth')
    return accuracy(tuned), accuracy(train(folder, 'scratch', target, seed))


def main() -> None:
    """Run one experiment for each seed."""
    kind, seeds = sys.argv[1], [int(seed) for seed in sys.argv[2:]]
    for seed in seeds:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            call(sys.executable, ROOT / 'tools/make_digits.py', '--out', folder / 'digits', cwd=folder)
            tuned, scratch = EXPERIMENTS[kind](folder, folder / 'digits', seed, *EPOCHS[kind])
        print(f'{kind}, seed {seed}: {tuned:.1f} from the checkpoint, {scratch:.1f} from scratch', flush=True)


EXPERIMENTS = {'labels': labels}
EPOCHS = {'labels': (12, 4)}  # for the checkpoint, and from it

if __name__ == '__main__':
    main()
