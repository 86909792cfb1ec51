"""What all tasks have in common, on MMEngine and mmcv. Importing this makes MMEngine load checkpoints as we do."""

from openmmlab.init_cfg import InitCfg
from openmmlab.layer_decay import LayerDecayConstructor, layer_groups
from openmmlab.loading import MAX_PIXELS, DataError, LoadImageFromFile, check_image_file
from openmmlab.pretrained import PretrainedInit, fit_and_tell, load_from_file

__all__ = [
    'MAX_PIXELS',
    'DataError',
    'InitCfg',
    'LayerDecayConstructor',
    'LoadImageFromFile',
    'PretrainedInit',
    'check_image_file',
    'fit_and_tell',
    'layer_groups',
    'load_from_file',
]
