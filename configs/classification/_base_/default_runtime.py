"""MMPretrain's runtime; seeded, the best checkpoint and the last three kept."""

_base_ = 'mmpretrain::_base_/default_runtime.py'

custom_imports = dict(imports=['classification'])

default_hooks = dict(checkpoint=dict(save_best='accuracy/top1', max_keep_ckpts=3))
randomness = dict(seed=0)
