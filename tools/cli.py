"""What the scripts that take a config share: arguments, configs, and errors a person can act on in one line."""

import argparse
import os
import sys
import time
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.device import get_device

from vision_rwkv.checkpoints import CheckpointError


class UserError(Exception):
    """Something the caller can mend: reported as one line, without a stack."""


class ConfigParser(argparse.ArgumentParser):
    """A config and changes of it; what is wrong on the command line becomes a UserError."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)
        self.add_argument('config', help='config file')
        self.add_argument(
            '--cfg-options',
            nargs='+',
            action=DictAction,
            default={},
            metavar='KEY=VALUE',
            help='override settings of the config, such as train_cfg.max_epochs=10',
        )

    def error(self, message: str) -> None:
        raise UserError(message)

    def parse_args(self, *args, **kwargs) -> argparse.Namespace:
        try:
            return super().parse_args(*args, **kwargs)
        except ValueError as error:  # from DictAction
            raise UserError(f'--cfg-options expects KEY=VALUE: {error}') from error


class Parser(ConfigParser):
    """Options shared by train.py and test.py.

    obsolete: flags of the scripts published for MMClassification 0.x, MMDetection 2.x and MMSegmentation 0.x, and what
    to do instead.
    """

    def __init__(self, description: str, obsolete: dict[str, str]):
        super().__init__(description)
        self.add_argument('--work-dir', help='where logs and checkpoints go (default: work_dirs/CONFIG_NAME)')
        self.add_argument('--launcher', choices=['none', 'pytorch', 'slurm'], default='none')
        self.add_argument('--local-rank', '--local_rank', type=int, help=argparse.SUPPRESS)
        for flag, instead in obsolete.items():
            self.add_argument(flag, nargs='*', action=_Obsolete, const=instead, help=argparse.SUPPRESS)


class _Obsolete(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f'{option_string} no longer exists; {self.const}')


def run(main) -> None:
    """Call main(); an error of the user becomes one line on stderr, from the first process alone, and exit status 2."""
    try:
        main()
    except (UserError, CheckpointError) as error:
        if int(os.environ.get('RANK', os.environ.get('SLURM_PROCID', 0))) > 0:
            time.sleep(10)  # leave the first process time to say it: it is stopped when another one ends
        else:
            print(f'{Path(sys.argv[0]).name}: error: {error}', file=sys.stderr)
        sys.exit(2)


def read_config(args: argparse.Namespace) -> Config:
    """The config with --cfg-options merged. Raises UserError if it cannot be read."""
    if not Path(args.config).is_file():
        raise UserError(f'config not found: {args.config} (from {os.getcwd()})')
    try:
        cfg = Config.fromfile(args.config)
    except ImportError as error:
        reason: BaseException = error
        while reason.__context__:  # MMEngine only says that custom_imports failed; why is behind it
            reason = reason.__context__
        raise UserError(f'{args.config}: {reason}') from error
    except FileNotFoundError as error:
        raise UserError(f'{args.config}: {error}') from error
    cfg.merge_from_dict(args.cfg_options)
    return cfg


def load_config(args: argparse.Namespace) -> Config:
    """As `read_config`, with work_dir and launcher set."""
    cfg = read_config(args)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    return cfg


def check_file(path: str, what: str) -> None:
    """Raise UserError if ``path`` is a local path and no file."""
    if '://' not in path and not Path(path).is_file():
        raise UserError(f'{what} not found: {path} (from {os.getcwd()})')


def check_data(*dataloaders: dict | None) -> None:
    """Raise UserError if the data_root of a data set, or of one nested in it, is no folder."""
    for dataloader in dataloaders:
        stack = [dataloader.get('dataset')] if dataloader else []
        while stack:
            dataset = stack.pop()
            if isinstance(dataset, (list, tuple)):
                stack.extend(dataset)
            elif isinstance(dataset, dict):
                stack.extend([dataset.get('dataset'), dataset.get('datasets')])
                root = dataset.get('data_root') or '.'
                if '://' not in root and not Path(root).is_dir():
                    raise UserError(f'data folder not found: {root} (from {os.getcwd()})')


def check_amp(cfg: Config) -> None:
    """Raise UserError if mixed precision is asked for without a GPU."""
    if cfg.optim_wrapper.get('type') == 'AmpOptimWrapper' and get_device() == 'cpu':
        raise UserError(
            'mixed precision (--amp, AmpOptimWrapper) needs a GPU; without one, use a config in float32 or '
            "--cfg-options optim_wrapper.type=OptimWrapper (and no 'dtype' or 'loss_scale' there)"
        )
