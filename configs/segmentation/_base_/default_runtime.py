"""MMSegmentation's runtime; seeded, a checkpoint every 16,000 iterations, the best by mIoU and the last three kept."""

# Not mmseg::, which looks for MMSegmentation under the name of a distribution that is no longer maintained.
_base_ = __import__('mmseg').__path__[0] + '/.mim/configs/_base_/default_runtime.py'

custom_imports = dict(imports=['segmentation'])

randomness = dict(seed=0)
