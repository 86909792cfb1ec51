"""What all tasks have in common, on MMEngine alone: how checkpoints are loaded. Importing this makes MMEngine do so."""

from openmmlab.pretrained import PretrainedInit, fit_and_tell, load_from_file

__all__ = ['PretrainedInit', 'fit_and_tell', 'load_from_file']
