"""Released files, with MMDetection 2.28's and MMSegmentation 0.30's names, fit the models of the configs strictly."""

import sys

import pytest
import torch
from dense_configs import DETECTION, ROOT, ROWS, TENSORS, load, models
from torch import Tensor

from vision_rwkv.checkpoints import CheckpointError, fit

sys.path.insert(0, str(ROOT / 'tests/checkpoints'))
from released import cheap, mask_rcnn, upernet  # noqa: E402

RELEASED = [name for name, row in ROWS.items() if row['version'] == 'vrwkv']


def file_of(name: str) -> dict[str, Tensor]:
    """The tensors of the released file of a config."""
    row = ROWS[name]
    shapes = {f'backbone.{key}': shape for key, shape in dict(TENSORS[row['tensors']]).items()}
    shapes |= (mask_rcnn if name in DETECTION else upernet)(row['dims'])
    return {key: cheap(*shape) for key, shape in shapes.items()}


def build(name: str) -> torch.nn.Module:
    """The model of a config on the meta device."""
    cfg = load(name).cfg
    with torch.device('meta'):
        return models(name).build(cfg.model)


@pytest.mark.parametrize('name', RELEASED)
def test_all_of_a_file_has_its_place(name):
    model, tensors = build(name), file_of(name)
    module = {f'module.{key}': tensor for key, tensor in tensors.items()}
    fitted = fit({'meta': {'epoch': 12, 'CLASSES': ('a', 'b')}, 'state_dict': module}, model)
    assert fitted.new == fitted.left_over == [] and fitted.tensors.keys() == tensors.keys()
    model.load_state_dict(fitted.tensors, strict=True, assign=True)
    assert all(value.device.type == 'cpu' for value in model.state_dict().values())


@pytest.mark.parametrize('name', [name for name in RELEASED if 'tiny' in name])
def test_one_that_lacks_a_tensor_does_not_fit(name):
    model, tensors = build(name), file_of(name)
    lost = list(tensors)[-1]
    del tensors[lost]
    with pytest.raises(CheckpointError, match=rf'missing from the file: {lost}'):
        fit({'state_dict': tensors}, model)
