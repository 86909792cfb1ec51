"""MMDetection's runtime; seeded, the best checkpoint by box AP and the last three kept."""

_base_ = 'mmdet::_base_/default_runtime.py'

custom_imports = dict(imports=['detection'])

default_hooks = dict(checkpoint=dict(save_best='coco/bbox_mAP', max_keep_ckpts=3))
randomness = dict(seed=0)
