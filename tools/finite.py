"""Stops a run when its loss or gradient is no longer finite, and finds the module where that began."""

import math
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from vision_rwkv.checkpoints import not_finite

SKIPPED = 50  # steps in a row that loss scaling may skip; from its start at 2 ** 16, 30 are more than any model needs


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in lists, tuples, dicts and what has `values()`, as MMEngine's data samples have."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif callable(values := getattr(value, 'values', None)):
        yield from tensors_in(list(values()))


def count(value: Any) -> tuple[int, int]:
    """(numbers that are not finite, numbers) in all tensors of ``value``."""
    tensors = list(tensors_in(value))
    return sum(int((~t.isfinite()).sum()) for t in tensors), sum(t.numel() for t in tensors)


class FirstModule:
    """Watches the forward pass of ``model``; ``found`` says where numbers first are not finite, None if nowhere."""

    def __init__(self, model: nn.Module):
        self.found: str | None = None
        self.hooks = []
        for name, module in model.named_modules():
            described = f'{name or "the model"} ({type(module).__name__})'
            before, after = partial(self._before, described), partial(self._after, described)
            self.hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self.hooks.append(module.register_forward_hook(after))

    def _before(self, described: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._look(f'the input of {described}', (args, kwargs))

    def _after(self, described: str, module: nn.Module, args: tuple, output: Any) -> None:
        self._look(described, output)

    def _look(self, what: str, numbers: Any) -> None:
        if self.found is None and (bad := count(numbers))[0]:
            self.found = f'{what}: {bad[0]} of {bad[1]} numbers'

    def __enter__(self) -> 'FirstModule':
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()


def random_states() -> tuple:
    """The states of all random generators; takes some 50 microseconds."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_states(states: tuple) -> None:
    """Back to what `random_states` gave."""
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state(states[3])


def find_first(model: nn.Module, optim_wrapper: OptimWrapper, batch: Any) -> str | None:
    """Run a training batch again, and say where numbers first are not finite: None if they all are."""
    bad = not_finite(model.state_dict())
    if bad:
        return f'the weights before this iteration: {", ".join(bad)}'
    with FirstModule(model) as first, optim_wrapper.optim_context(model):
        data = model.data_preprocessor(batch, True)
        if count(data)[0]:
            return 'the batch itself'
        losses = model._run_forward(data, mode='loss')
    if first.found:
        return first.found
    loss = model.parse_losses(losses)[0]
    if not math.isfinite(loss):
        return 'the sum of the losses'
    optim_wrapper.zero_grad()
    scaler = getattr(optim_wrapper, 'loss_scaler', None)
    (scaler.scale(loss) if scaler else loss).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    bad = list(not_finite(gradients))  # from the image to the loss, as models list their parameters
    return f'the gradient of {bad[-1]} (not finite: {len(bad)} of {len(gradients)} gradients)' if bad else None


class StopIfNotFinite(Hook):
    """Raises FloatingPointError when loss or gradient is not finite, before any weight changes.

    The loss travels to the CPU while gradients are computed, and the norm of the gradient is there already where it is
    clipped: the GPU waits for nothing that it did not wait for before. Random states are kept for the second run of a
    batch.
    """

    priority = 'HIGH'  # before anything is averaged, logged or saved

    def before_train(self, runner) -> None:
        self.runner, self.skipped = runner, 0
        wrapper = runner.optim_wrapper
        update = wrapper.update_params

        def watched_update(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            self._take(loss)
            update(loss, *args, **kwargs)

        wrapper.update_params = watched_update
        wrapper.optimizer.register_step_pre_hook(lambda *_: self._check_step())

    def before_train_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        self.batch, self.states, self.stepped = data_batch, random_states(), False
        self.loss, self.arrival = 0.0, None

    def after_train_iter(self, runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """The step may have been skipped, by loss scaling or to accumulate gradients."""
        self._check_loss()
        if self.stepped:
            self.skipped = 0
        elif self.scaled and runner.optim_wrapper.should_update():
            self.skipped += 1
        if self.skipped == SKIPPED:
            self._stop(f'no gradient was finite in {SKIPPED} iterations, however the loss was scaled')
        self.batch = None

    @property
    def scaled(self) -> bool:
        """Whether loss scaling deals with gradients that are not finite."""
        return hasattr(self.runner.optim_wrapper, 'loss_scaler')

    def _take(self, loss: Tensor) -> None:
        self.loss = loss.detach().to('cpu', non_blocking=True)
        self.arrival = torch.cuda.Event() if loss.is_cuda else None
        if self.arrival:
            self.arrival.record()

    def _check_loss(self, everywhere: bool = False) -> None:
        if self.arrival:
            self.arrival.synchronize()
        if not math.isfinite(self.loss):
            self._stop(f'the loss is {float(self.loss)}', everywhere)

    def _check_step(self) -> None:
        self.stepped = True
        wrapper = self.runner.optim_wrapper
        norms = wrapper.message_hub.log_scalars.get('train/grad_norm')
        norm = norms.current() if norms and wrapper.clip_grad_kwargs and not self.scaled else 0.0
        self._check_loss(everywhere=not math.isfinite(norm))
        if not math.isfinite(norm):
            self._stop(f'the norm of the gradient is {norm}', everywhere=True)

    def _stop(self, what: str, everywhere: bool = False) -> None:
        """everywhere: all processes come here, as all have the same gradient, the mean of theirs."""
        model = self.runner.model
        while is_model_wrapper(model):
            model = model.module
        set_random_states(self.states)
        place = find_first(model, self.runner.optim_wrapper, self.batch)
        if everywhere and self.runner.distributed:  # tell what the process says whose batch it was
            found = all_gather_object((what, place))
            rank = next((i for i, (_, place) in enumerate(found) if place), 0)
            what, place = found[rank]
            what += f' in process {rank}'
        raise FloatingPointError(f'{what}; first not finite: {place or "nothing, when this batch was run again"}')
