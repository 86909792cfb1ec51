"""Does a checkpoint help? Trains from one and from scratch, equally long, on handwritten digits.

python tests/tools/transfer.py labels 0 1 2    learn digits 0 to 4, then 5 to 9, with seeds 0, 1, 2
python tests/tools/transfer.py masked 0 1 2    learn to fill in masked patches, then the ten digits
"""

import logging
import sys
import tempfile
from pathlib import Path

import torch
from mmengine.config import Config
from scripts import ROOT

sys.path.insert(0, str(ROOT))

from tools import make_digits  # noqa: E402
from tools.draw_predictions import read_log  # noqa: E402
from tools.runner import Runner  # noqa: E402

CONFIGS = ROOT / 'configs/classification'
# The encoder of the masked pre-training.
ENCODER = {'post_norm': True, 'key_norm': True, 'init_values': 1.0}


def write_halves(digits: Path, folder: Path) -> None:
    """The data set as low (digits 0 to 4) and high (5 to 9), by links."""
    for label in range(10):
        for side in ('train', 'val'):
            link = folder / ('low' if label < 5 else 'high') / side / str(label)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(digits / side / str(label))


def run(config: str, work_dir: Path, data: Path, seed: int, epochs: int, **changes) -> Path:
    """Train a config for so many epochs on one process, with its schedule shortened; the last checkpoint."""
    cfg = Config.fromfile(CONFIGS / f'{config}.py')
    cfg.merge_from_dict(changes)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        if loader:
            loader.dataset.data_root = str(data)
    cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None
    warmup, cosine = cfg.param_scheduler
    warmup.end, cosine.begin, cosine.end = 1, 1, epochs
    cfg.train_cfg.update(max_epochs=epochs, val_interval=epochs)
    cfg.randomness = {'seed': seed}
    cfg.log_level = logging.ERROR
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = f'{work_dir.parent.name}_{work_dir.name}'
    Runner.from_cfg(cfg).train()
    return work_dir / f'epoch_{epochs}.pth'


def accuracy(checkpoint: Path) -> float:
    """Top-1 at the end of the run that wrote ``checkpoint``."""
    (value,) = read_log(checkpoint.parent)[1].values()
    return value


def labels(folder: Path, digits: Path, seed: int, first: int, then: int) -> tuple[float, float]:
    """Top-1 on digits 5 to 9 after ``then`` epochs: from a model of ``first`` epochs on 0 to 4, and from scratch."""
    write_halves(digits, folder)
    five = {'model.head.num_classes': 5, 'data_preprocessor.num_classes': 5}
    source = run('vrwkv/vrwkv_digits', folder / 'source', folder / 'low', seed, first, **five)
    target = ('vrwkv/vrwkv_digits', folder / 'high', seed, then)
    return tuned_and_scratch(folder, source, *target, **five)


def masked(folder: Path, digits: Path, seed: int, first: int, then: int) -> tuple[float, float]:
    """Top-1 on the ten digits after ``then`` epochs: from ``first`` epochs of masked pre-training, and from scratch."""
    source = run('mae/vrwkv_mae_digits', folder / 'source', digits, seed, first)
    losses = read_log(source.parent)[0]
    steps = sorted(losses)
    print(f'loss of step {steps[0]}: {losses[steps[0]]:.3f}, of step {steps[-1]}: {losses[steps[-1]]:.3f}', flush=True)
    options = {f'model.backbone.{name}': value for name, value in ENCODER.items()}
    return tuned_and_scratch(folder, source, 'vrwkv/vrwkv_digits', digits, seed, then, **options)


def tuned_and_scratch(folder: Path, source: Path, config: str, data: Path, seed: int, epochs: int, **changes):
    """Top-1 of ``config`` from the checkpoint ``source``, and from scratch."""
    tuned = run(config, folder / 'tuned', data, seed, epochs, load_from=str(source), **changes)
    return accuracy(tuned), accuracy(run(config, folder / 'scratch', data, seed, epochs, **changes))


EXPERIMENTS = {'labels': labels, 'masked': masked}
EPOCHS = {'labels': (10, 3), 'masked': (20, 3)}  # for the checkpoint, and from it


def compare(kind: str, seed: int, folder: Path) -> tuple[float, float]:
    """Top-1 from the checkpoint and from scratch; ``folder`` is empty.

    On one thread: in steps this short two of them mostly wait for each other, for whole time slices where others use
    the cores (a step of 50 ms took 4 s).
    """
    make_digits.make(folder / 'digits', 'classification')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return EXPERIMENTS[kind](folder, folder / 'digits', seed, *EPOCHS[kind])
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    """Run one experiment for each seed."""
    kind, *seeds = sys.argv[1:]
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            tuned, scratch = compare(kind, int(seed), Path(folder))
        print(f'{kind}, seed {seed}: {tuned:.1f} from the checkpoint, {scratch:.1f} from scratch', flush=True)


if __name__ == '__main__':
    main()
