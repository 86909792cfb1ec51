"""MMEngine's FlexibleRunner, for configs with a strategy: parameters and optimiser spread over the processes."""

import torch
from mmengine import runner as mm
from mmengine._strategy import deepspeed, fsdp
from mmengine.device import get_device
from mmengine.dist import all_reduce
from mmengine.fileio import register_backend
from mmengine.optim import OptimWrapper
from mmengine.registry import FUNCTIONS, OPTIM_WRAPPERS, STRATEGIES
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from tools.cli import UserError
from tools.runner import Runner, SeedEpochs, WholeFileBackend
from vision_rwkv.backbones.blocks import Block

KINDS = ('FSDPStrategy', 'DeepSpeedStrategy')
# One file, gathered by the first process. FSDP frees what it gathered once it is "offloaded to the CPU", though it is
# there already, and reads freed memory: so on a CPU, unlike on GPUs, nothing is offloaded.
WHOLE_ON_CPU = {
    'state_dict_type': 'FULL_STATE_DICT',
    'state_dict_config': {'type': 'FullStateDictConfig', 'rank0_only': True},
    'optim_state_dict_config': {'type': 'FullOptimStateDictConfig', 'rank0_only': True},
}


@FUNCTIONS.register_module()
def each_block(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """FSDP's auto_wrap_policy: every block is a unit that is gathered and freed by itself."""
    return recurse or isinstance(module, Block)


@OPTIM_WRAPPERS.register_module()
class ShardedOptimWrapper(OptimWrapper):
    """MMEngine's, but clip_grad=dict(max_norm=...) is of the whole gradient: a process has only a part of it."""

    def _clip_grad(self) -> None:
        grads = [p.grad for group in self.optimizer.param_groups for p in group['params'] if p.grad is not None]
        total = torch.stack([grad.float().square().sum() for grad in grads]).sum()
        all_reduce(total)
        norm = total.sqrt()
        scale = (self.clip_grad_kwargs['max_norm'] / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(scale)
        self.message_hub.update_scalar('train/grad_norm', float(norm))


@STRATEGIES.register_module(force=True)
class FSDPStrategy(fsdp.FSDPStrategy):
    """MMEngine's, with PyTorch's present order of arguments, and for processes on a CPU too."""

    def __init__(self, *, model_wrapper: dict | None = None, state_dict_cfg: str | dict = 'full', **kwargs):
        if get_device() == 'cpu':
            model_wrapper = {**(model_wrapper or {}), 'device_id': torch.device('cpu')}
            state_dict_cfg = WHOLE_ON_CPU if state_dict_cfg == 'full' else state_dict_cfg
        super().__init__(model_wrapper=model_wrapper, state_dict_cfg=state_dict_cfg, **kwargs)

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """From what `optim_state_dict` returned."""
        optimizer = self.optim_wrapper.optimizer
        mine = FullyShardedDataParallel.optim_state_dict_to_load(self.model, optimizer, state_dict)
        self.optim_wrapper.load_state_dict(mine)

    def save_checkpoint(self, filename: str, *, save_optimizer: bool = True, **kwargs) -> None:
        """As MMEngine's, but on a CPU without the optimiser: there PyTorch gathers both its moments in one buffer."""
        super().save_checkpoint(filename, save_optimizer=save_optimizer and get_device() != 'cpu', **kwargs)


class ShardedRunner(mm.FlexibleRunner):
    """With gloo processes on a CPU, repeatable epochs and files written whole; the rest is MMEngine's."""

    build_dataloader = staticmethod(Runner.build_dataloader)

    def __init__(self, *args, **kwargs):
        register_backend('local', WholeFileBackend, force=True, prefixes='')
        super().__init__(*args, **kwargs)
        self.register_hook(SeedEpochs())

    def resume(self, *args, **kwargs) -> None:
        """As MMEngine's, whose checkpoints say one epoch too many where the score was a new best. Raises UserError."""
        if isinstance(self.strategy, FSDPStrategy) and get_device() == 'cpu':
            raise UserError('--resume: FSDP on a CPU does not save the optimiser; it resumes on GPUs')
        super().resume(*args, **kwargs)
        loop = self.train_loop
        if isinstance(loop, mm.EpochBasedTrainLoop):
            loop._epoch = loop._iter // len(loop.dataloader)

    def build_strategy(self, strategy=None, launcher='none', **kwargs):
        """As MMEngine's. Raises UserError for a strategy that cannot run here."""
        kind = strategy['type']
        if kind not in KINDS:
            raise UserError(f'strategy.type must be {" or ".join(KINDS)}, got {kind}')
        if launcher == 'none':
            raise UserError(f'{kind} spreads a model over processes: use tools/dist_train.sh CONFIG GPUS')
        if kind == 'DeepSpeedStrategy':
            if deepspeed.deepspeed is None:
                raise UserError('DeepSpeedStrategy needs DeepSpeed: pip install deepspeed')
            # MMEngine registers DeepSpeed's own optimisers, some of which DeepSpeed no longer has; ours is PyTorch's.
            deepspeed.register_deepspeed_optimizers = lambda: []
        if get_device() == 'cpu':
            torch.distributed.init_process_group('gloo')
        return super().build_strategy(strategy, launcher, **kwargs)
