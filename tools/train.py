"""Train the model of a config, for any task."""

import importlib.util
import signal
import sys
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402

from tools.cli import Parser, UserError, check_amp, check_data, check_file, load_config, run  # noqa: E402
from tools.runner import Runner, leave_group  # noqa: E402
from tools.saving import latest_checkpoint  # noqa: E402

_GPUS = 'use tools/dist_train.sh CONFIG GPUS (CUDA_VISIBLE_DEVICES chooses which)'
OBSOLETE = {
    '--resume-from': 'use --resume CHECKPOINT',
    '--auto-resume': 'use --resume',
    '--load-from': 'use --cfg-options load_from=CHECKPOINT',
    '--no-validate': 'use --cfg-options val_cfg=None val_dataloader=None val_evaluator=None',
    '--gpus': _GPUS,
    '--gpu-ids': _GPUS,
    '--gpu-id': _GPUS,
    '--device': 'use CUDA_VISIBLE_DEVICES (empty for the CPU)',
    '--deterministic': 'use --cfg-options randomness.deterministic=True',
    '--diff-seed': 'use --cfg-options randomness.diff_rank_seed=True',
    '--options': 'use --cfg-options KEY=VALUE',
    '--autoscale-lr': 'use --auto-scale-lr',
    '--tensorboard': 'use --log tensorboard',
}
LOGS = {'tensorboard': 'TensorboardVisBackend', 'wandb': 'WandbVisBackend'}


def parse_args():
    """The command line."""
    parser = Parser(__doc__, OBSOLETE)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue from this checkpoint, or from the latest in the work dir (a fresh start if there is none)',
    )
    parser.add_argument(
        '--amp',
        nargs='?',
        const='float16',
        choices=['float16', 'bfloat16'],
        help='mixed precision: float16 with dynamic loss scale, or bfloat16 without',
    )
    parser.add_argument('--auto-scale-lr', action='store_true', help="scale the lr by this run's batch size")
    parser.add_argument('--log', nargs='+', choices=LOGS, default=[], help='write logs for these too')
    parser.add_argument('--seed', type=int, help="instead of the config's randomness.seed")
    return parser.parse_args()


def apply_args(cfg: Config, args) -> None:
    """Set in ``cfg`` what the options of ``args`` ask for. Raises UserError where that cannot be."""
    if args.seed is not None:
        cfg.merge_from_dict({'randomness.seed': args.seed})
    if args.amp:
        cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype=args.amp)
        if args.amp == 'bfloat16':
            cfg.optim_wrapper.loss_scale = 1.0  # its range is that of float32
        else:
            cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if not (cfg.get('auto_scale_lr') or {}).get('base_batch_size'):
            raise UserError('--auto-scale-lr needs auto_scale_lr.base_batch_size in the config')
        cfg.auto_scale_lr.enable = True
    for name in args.log:
        if not importlib.util.find_spec(name):
            raise UserError(f'--log {name}: it is not installed: pip install {name}')
        cfg.visualizer.setdefault('vis_backends', []).append({'type': LOGS[name]})
    if args.resume:
        checkpoint = latest_checkpoint(cfg.work_dir) if args.resume == 'auto' else args.resume
        if checkpoint:
            cfg.merge_from_dict({'resume': True, 'load_from': checkpoint})


def main():
    """Train."""
    args = parse_args()
    cfg = load_config(args)
    if not cfg.get('train_dataloader'):
        raise UserError(f'{args.config} has no train_dataloader: nothing to train')
    apply_args(cfg, args)
    if cfg.get('load_from') and not (cfg.get('strategy') and Path(cfg.load_from).is_dir()):  # DeepSpeed's are folders
        check_file(cfg.load_from, 'checkpoint')
    check_data(cfg.train_dataloader, cfg.get('val_dataloader'))
    check_amp(cfg)
    if args.launcher == 'pytorch':  # do not outlive a killed launcher, and write beside the run that follows
        torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)
    runner = Runner
    if cfg.get('strategy'):
        from tools.sharded import ShardedRunner as runner
    runner.from_cfg(cfg).train()
    leave_group()


if __name__ == '__main__':
    run(main)
