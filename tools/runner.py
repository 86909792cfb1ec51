"""MMEngine's runner, safe to kill and resume, and usable without a GPU."""

import gc
import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from mmengine import runner as mm
from mmengine.device import get_device
from mmengine.dist import all_reduce_params
from mmengine.fileio import register_backend
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, MMDistributedDataParallel, is_model_wrapper, revert_sync_batchnorm
from mmengine.runner.checkpoint import CheckpointLoader

from openmmlab import fit_and_tell
from tools.cli import UserError
from tools.failures import explain, lost_another
from tools.finite import StopIfNotFinite
from tools.saving import WholeFileBackend, latest_checkpoint
from vision_rwkv.checkpoints import CheckpointError, not_finite

TIMEOUT = 600  # seconds in which processes must answer each other, unless env_cfg.dist_cfg.timeout says otherwise


class SeedEpochs(Hook):
    """Draws all randomness of an epoch from (seed, process, iterations done), so that a resumed run repeats it.

    Data-loading workers are seeded by PyTorch from the same state when they start: with persistent_workers, which
    start once, augmentation after a resume differs.
    """

    def before_train_epoch(self, runner) -> None:
        state = np.random.SeedSequence([runner.seed, runner.rank, runner.iter]).generate_state(1)
        seed = int(state[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


class ValidateResumed(Hook):
    """Validates a resumed model if its epoch was to be: the run may have ended between checkpoint and validation.

    If it did not, the same metric comes out again and changes nothing.
    """

    priority = 'LOWEST'  # after CheckpointHook has read the best score so far

    def before_train(self, runner) -> None:
        epoch, loop = runner.epoch, runner.train_loop
        due = epoch >= loop.val_begin and (epoch % loop.val_interval == 0 or epoch == loop.max_epochs)
        if runner.resumed and runner.val_loop is not None and epoch > 0 and due:
            runner.val_loop.run()


class AverageBuffers(Hook):
    """Averages the statistics of batch norm over processes that do not share batches: those on a CPU.

    Before anything is saved or tested, so that both are the same model.
    """

    priority = 'VERY_HIGH'

    def after_train_epoch(self, runner) -> None:
        all_reduce_params(runner.model.buffers(), op='mean')

    def before_val_epoch(self, runner) -> None:
        self.after_train_epoch(runner)


def leave_group() -> None:
    """End the process group, if there is one, and its threads."""
    if torch.distributed.is_initialized():
        gc.collect()  # the model of a runner, which refers to itself, holds the group
        torch.distributed.destroy_process_group()  # a thread of Gloo's at work when Python ends would abort the process


@contextmanager
def data_errors(what: str) -> Iterator[None]:
    """What is wrong with the data of ``what`` becomes a UserError."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise UserError(f'{what}: {error}') from error


class Runner(mm.Runner):
    """MMEngine's Runner with gloo processes on a CPU, repeatable epochs and checkpoints that must fit."""

    def __init__(self, *args, **kwargs):
        register_backend('local', WholeFileBackend, force=True, prefixes='')
        super().__init__(*args, **kwargs)
        self.register_hook(SeedEpochs())
        self.register_hook(StopIfNotFinite())
        loop = self._train_loop if isinstance(self._train_loop, dict) else {}
        if loop.get('by_epoch') or loop.get('type') == 'EpochBasedTrainLoop':
            self.register_hook(ValidateResumed())
        if self.distributed and get_device() == 'cpu':
            self.register_hook(AverageBuffers())

    @property
    def resumed(self) -> bool:
        """Whether this run continues another."""
        return self._resume and self._has_loaded

    def setup_env(self, env_cfg: dict) -> None:
        """As MMEngine's, but processes without a GPU talk through gloo (MMEngine would look for a GPU first)."""
        if self._launcher == 'slurm':
            os.environ.setdefault('MASTER_PORT', str(20000 + int(os.environ['SLURM_JOB_ID']) % 20000))
        env_cfg = {**env_cfg, 'dist_cfg': {'timeout': TIMEOUT, **env_cfg.get('dist_cfg', {})}}
        timeout = env_cfg['dist_cfg']['timeout']
        if not isinstance(timeout, (int, float)) or not timeout > 0:
            raise UserError(f'env_cfg.dist_cfg.timeout: expected a number of seconds, got {timeout!r}')
        if self.distributed and get_device() == 'cpu' and not torch.distributed.is_initialized():
            if self._launcher == 'slurm':
                _read_slurm()
            torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=timeout))
        super().setup_env(env_cfg)

    def set_randomness(self, seed: int | None, diff_rank_seed: bool = False, deterministic: bool = False) -> None:
        """As MMEngine's, and deterministic mode works on a GPU too: PyTorch wants this setting of cuBLAS for it."""
        if deterministic:
            os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        super().set_randomness(seed, diff_rank_seed, deterministic)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: torch.nn.Module) -> torch.nn.Module:
        """As MMEngine's, but on a CPU without device numbers and synchronised batch norm, which need a GPU."""
        if not self.distributed or get_device() != 'cpu':
            return super().wrap_model(model_wrapper_cfg, model)
        return MMDistributedDataParallel(
            revert_sync_batchnorm(model),
            broadcast_buffers=False,
            find_unused_parameters=self.cfg.get('find_unused_parameters', False),
        )

    @staticmethod
    def build_dataloader(dataloader, seed=None, diff_rank_seed=False):
        """As MMEngine's, but workers keep the seed PyTorch gives them: MMEngine's is the same every epoch."""
        if isinstance(dataloader, dict):
            dataloader = deepcopy(dataloader)
            dataloader.setdefault('worker_init_fn', {'type': _keep_seed})
        with data_errors('data'):
            return mm.Runner.build_dataloader(dataloader, seed=seed, diff_rank_seed=diff_rank_seed)

    def build_evaluator(self, evaluator):
        """As MMEngine's."""
        with data_errors('data to evaluate with'):
            return super().build_evaluator(evaluator)

    def load_checkpoint(self, filename: str, map_location='cpu', strict: bool = False, **_) -> dict:
        """As MMEngine's, but of any layout and wholly or not at all: see `vision_rwkv.checkpoints.fit`.

        To test or resume, every tensor must have its place.
        """
        model = self.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        start = not (strict or self._resume or self._train_loop is None)
        try:
            checkpoint = CheckpointLoader.load_checkpoint(filename, map_location)
            fitted = fit_and_tell(checkpoint, model, filename, start)
        except CheckpointError as error:
            raise UserError(f'checkpoint {error}') from error
        checkpoint['state_dict'] = fitted.tensors
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        model.load_state_dict(checkpoint['state_dict'], strict=False)
        self._has_loaded = True
        self.logger.info(f'Load checkpoint from {filename}')
        return checkpoint

    def train(self) -> torch.nn.Module:
        """As MMEngine's; what a run fails of that is no fault of the code becomes a UserError that says where."""
        try:
            return super().train()
        except Exception as error:
            what = explain(error)
            if not what:
                self.logger.error(f'{self.where}: {type(error).__name__}')
                raise
            if lost_another(error):
                time.sleep(10)  # the other one says why; the launcher then ends this one
            last = latest_checkpoint(self.work_dir) or 'none'
            raise UserError(f'{self.where}: {what}; last whole checkpoint: {last}') from error

    def test(self) -> dict:
        """As MMEngine's; the same errors."""
        try:
            return super().test()
        except Exception as error:
            what = explain(error)
            if not what:
                raise
            raise UserError(what) from error

    @property
    def where(self) -> str:
        """The process, if there are several, and how far the training is."""
        process = f'process {self.rank}, ' if self.world_size > 1 else ''
        return f'{process}epoch {self.epoch + 1}, iteration {self.iter + 1}'

    def save_checkpoint(self, out_dir: str, filename: str, *args, **kwargs) -> None:
        """As MMEngine's, but never weights that are not finite; best.pth points to the best one.

        Raises FloatingPointError.
        """
        bad = not_finite(self.model.state_dict()) if self.rank == 0 else []
        if bad:
            raise FloatingPointError(f'{filename} is not written: weights that are not finite: {", ".join(bad)}')
        super().save_checkpoint(out_dir, filename, *args, **kwargs)
        if filename.startswith('best_') and self.rank == 0:
            link = Path(out_dir, '.best.pth.partial')
            link.unlink(missing_ok=True)
            link.symlink_to(filename)
            os.replace(link, Path(out_dir, 'best.pth'))


def _read_slurm() -> None:
    for name, slurm in (('RANK', 'PROCID'), ('LOCAL_RANK', 'LOCALID'), ('WORLD_SIZE', 'NTASKS')):
        os.environ[name] = os.environ[f'SLURM_{slurm}']
    if 'MASTER_ADDR' not in os.environ:
        hosts = ['scontrol', 'show', 'hostnames', os.environ['SLURM_NODELIST']]
        os.environ['MASTER_ADDR'] = subprocess.check_output(hosts, text=True).split()[0]


def _keep_seed(worker_id: int) -> None:
    pass
