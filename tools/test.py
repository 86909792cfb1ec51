"""Test a checkpoint with the data and metrics of a config, for any task."""

import sys
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

from mmengine.config import Config  # noqa: E402

from tools.cli import Parser, UserError, check_data, check_file, load_config, run  # noqa: E402
from tools.runner import Runner, leave_group  # noqa: E402

_METRICS = "the config's test_evaluator says what is computed (--cfg-options test_evaluator.KEY=VALUE)"
_SHOW = "set the config's visualization hook: --cfg-options default_hooks.visualization.KEY=VALUE"
_GPUS = 'use tools/dist_test.sh CONFIG CHECKPOINT GPUS (CUDA_VISIBLE_DEVICES chooses which)'
OBSOLETE = {
    '--metrics': _METRICS,
    '--metric-options': _METRICS,
    '--eval': _METRICS,
    '--eval-options': _METRICS,
    '--format-only': 'use --cfg-options test_evaluator.format_only=True',
    '--show': _SHOW,
    '--show-dir': _SHOW,
    '--show-options': _SHOW,
    '--show-score-thr': _SHOW,
    '--opacity': _SHOW,
    '--out-items': 'use --out FILE.pkl, which holds everything',
    '--gpu-collect': 'use --cfg-options test_evaluator.collect_device=gpu',
    '--tmpdir': 'use --cfg-options test_evaluator.collect_dir=FOLDER',
    '--gpu-ids': _GPUS,
    '--gpu-id': _GPUS,
    '--device': 'use CUDA_VISIBLE_DEVICES (empty for the CPU)',
    '--options': 'use --cfg-options KEY=VALUE',
    '--aug-test': 'use --tta',
    '--fuse-conv-bn': 'there is no batch norm in the backbone to fuse',
}


# --out writes every prediction as MMEngine has it, unless the task has a leaner form.
DUMPS = {'mmdet': 'DumpDetResults', 'mmseg': 'DumpSegResults'}


def parse_args():
    """The command line."""
    parser = Parser(__doc__, OBSOLETE)
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--out', metavar='FILE.pkl', help='write every prediction to this file')
    parser.add_argument('--tta', action='store_true', help="test-time augmentation: the config's tta_pipeline")
    return parser.parse_args()


def augment(cfg: Config) -> None:
    """Test with the config's tta_pipeline, the predictions merged by its tta_model. Raises UserError without them."""
    if not cfg.get('tta_pipeline') or not cfg.get('tta_model'):
        raise UserError('--tta needs a config with tta_pipeline and tta_model')
    cfg.model = {**cfg.tta_model, 'module': cfg.model}
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline


def main():
    """Test."""
    args = parse_args()
    if args.out and not args.out.endswith('.pkl'):
        raise UserError(f'--out expects a name that ends in .pkl, got {args.out}')
    cfg = load_config(args)
    if not cfg.get('test_dataloader'):
        raise UserError(f'{args.config} has no test_dataloader: nothing to test on')
    check_file(args.checkpoint, 'checkpoint')
    check_data(cfg.test_dataloader)
    cfg.merge_from_dict({'load_from': args.checkpoint, 'resume': False})
    for key in ('train_cfg', 'train_dataloader', 'optim_wrapper', 'param_scheduler'):
        cfg[key] = None
    if args.tta:
        augment(cfg)
    if args.out:
        metrics = cfg.test_evaluator if isinstance(cfg.test_evaluator, (list, tuple)) else [cfg.test_evaluator]
        cfg.test_evaluator = [
            *metrics,
            {'type': DUMPS.get(cfg.default_scope, 'DumpResults'), 'out_file_path': args.out},
        ]
    Runner.from_cfg(cfg).test()
    leave_group()


if __name__ == '__main__':
    run(main)
