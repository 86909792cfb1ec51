"""What all tasks have in common, on MMEngine alone. Importing this makes MMEngine load checkpoints as we do."""

from openmmlab.init_cfg import InitCfg
from openmmlab.layer_decay import LayerDecayConstructor, layer_groups
from openmmlab.pretrained import PretrainedInit, fit_and_tell, load_from_file

__all__ = ['InitCfg', 'LayerDecayConstructor', 'PretrainedInit', 'fit_and_tell', 'layer_groups', 'load_from_file']
