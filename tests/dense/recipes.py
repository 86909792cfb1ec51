"""Pieces of the tests of both recipes."""

import torch
from mmengine.registry import PARAM_SCHEDULERS


def rates(schedulers: list[dict], lr: float, iterations: int, per_epoch: int | None = None) -> list[float]:
    """The learning rate of each iteration under the schedulers of a config."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    built = []
    for config in map(dict, schedulers):
        cls = PARAM_SCHEDULERS.get(config.pop('type'))
        config.pop('_scope_', None)  # of a base that is MMDetection's own
        by_epoch = config.get('by_epoch', True)
        if config.pop('convert_to_iter_based', False):
            built.append((cls.build_iter_from_epoch(optimizer=optimizer, epoch_length=per_epoch, **config), False))
        else:
            built.append((cls(optimizer=optimizer, **config), by_epoch))
    found = []
    for iteration in range(1, iterations + 1):
        found.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler, by_epoch in built:
            if not by_epoch or iteration % per_epoch == 0:
                scheduler.step()
    return found


def steps_of(pipeline: list[dict]) -> dict:
    """{type: config} of a pipeline."""
    return {step.type: step for step in pipeline}
