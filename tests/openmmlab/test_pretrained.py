"""MMEngine loads checkpoints strictly, in released layouts, and runs nothing from them."""

import os
from copy import deepcopy

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModule
from mmengine.runner.checkpoint import CheckpointLoader, load_checkpoint
from torch import nn

import openmmlab
from vision_rwkv import backbones
from vision_rwkv.checkpoints import CheckpointError, read


class Backbone(openmmlab.InitCfg, backbones.VRWKV, BaseModule):
    """As the task folders register it."""

    def __init__(self, init_cfg=None, **arguments):
        small = {'img_size': 16, 'patch_size': 8, 'embed_dims': 16, 'depth': 1}
        super().__init__(**small | arguments, init_cfg=init_cfg)


class Model(BaseModule):
    """A backbone in a model, as a classifier has it."""

    def __init__(self, init_cfg=None, classes=4):
        super().__init__(init_cfg)
        self.backbone = Backbone()
        self.head = nn.Linear(16, classes)


class Evil:
    def __reduce__(self):
        return os.system, ('touch ran',)


@pytest.fixture
def source(tmp_path):
    """A model, and its checkpoint as a.pth in the layout of another code base."""
    model = Model()
    nn.init.normal_(model.backbone.pos_embed)
    state = {f'module.{name}': tensor for name, tensor in model.state_dict().items()}
    torch.save({'model': state, 'model_ema': state, 'epoch': 3}, tmp_path / 'a.pth')
    return model.state_dict()


def pretrained(path, **more):
    return {'type': 'Pretrained', 'checkpoint': str(path), **more}


def assert_equal(found, expected, prefix=''):
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[prefix + name]), name


@pytest.mark.parametrize('more', [{}, {'prefix': 'backbone.'}, {'prefix': 'backbone'}])
def test_init_cfg_of_a_backbone(source, tmp_path, more):
    model = Backbone(pretrained(tmp_path / 'a.pth', **more))
    model.init_weights()
    assert_equal(model.state_dict(), source, 'backbone.')


def test_init_cfg_of_a_model(source, tmp_path):
    model = Model(pretrained(tmp_path / 'a.pth'), classes=7)
    model.init_weights()
    assert_equal(model.backbone.state_dict(), source, 'backbone.')
    assert model.head.weight.shape == (7, 16)


def test_init_cfg_that_does_not_fit_changes_nothing(source, tmp_path):
    for arguments, more, message in (
        ({'depth': 2}, {}, r'missing from the file: backbone\.layers\.1\.'),
        ({'embed_dims': 32}, {}, r'pos_embed has the shape \(1, 4, 16\) in the file, \(1, 4, 32\) in the model'),
        ({}, {'prefix': 'neck'}, r'no tensor has a name that begins with neck\.'),
    ):
        model = Backbone(pretrained(tmp_path / 'a.pth', **more), **arguments)
        before = deepcopy(model.state_dict())
        with pytest.raises(CheckpointError, match=rf'a\.pth: .*{message}'):
            model.init_weights()
        assert_equal(model.state_dict(), before)


def test_other_models_are_mmengines(tmp_path):
    torch.save({'weight': torch.ones(2, 2)}, tmp_path / 'a.pth')

    class Other(BaseModule):
        def __init__(self):
            super().__init__(pretrained(tmp_path / 'a.pth'))
            self.weight, self.bias = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))

    model = Other()
    model.init_weights()
    assert model.weight.eq(1).all() and not model.bias.any()


def test_mmengines_functions_see_our_names(source, tmp_path):
    contents = CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'))
    assert contents['state_dict'].keys() == source.keys() and contents['epoch'] == 3
    model = Model()
    load_checkpoint(model, str(tmp_path / 'a.pth'), strict=True)
    assert_equal(model.state_dict(), source)


def test_no_code_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': Model().state_dict(), 'meta': Evil()}, 'a.pth')
    for load in (CheckpointLoader.load_checkpoint, lambda path: Backbone(pretrained(path)).init_weights()):
        with pytest.raises(CheckpointError, match=r'a\.pth: refused: .* posix\.system'):
            load('a.pth')
    assert not os.path.exists('ran')


def test_checkpoints_of_a_run_keep_what_a_resume_needs(tmp_path):
    log = HistoryBuffer()
    log.update(3.0)
    log.update(5.0)
    hub = {'log_scalars': {'loss': log}, 'runtime_info': {'best_score': np.float64(7.5), 'at': slice(1, 2)}}
    torch.save({'state_dict': {'a': torch.ones(1)}, 'optimizer': {'state': {}}, 'message_hub': hub}, tmp_path / 'a.pth')
    hub = CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'))['message_hub']
    assert hub['log_scalars']['loss'].statistics('mean') == 4.0
    assert hub['runtime_info'] == {'best_score': 7.5, 'at': slice(1, 2)}


@pytest.mark.parametrize('kind', [np.float16, np.float32, np.float64, np.int32, np.int64, np.uint8, np.bool_])
def test_numbers_of_any_kind_are_kept(kind, tmp_path):
    """MMSegmentation's metrics are float32."""
    numbers = {'metric': kind(1), 'metrics': np.ones(3, kind)}
    torch.save({'state_dict': {'a': torch.ones(1)}, 'message_hub': numbers}, tmp_path / 'a.pth')
    found = CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'))['message_hub']
    assert type(found['metric']) is kind and found['metric'] == 1
    assert found['metrics'].dtype == kind and found['metrics'].all()


def test_getattr_reaches_nothing_else(tmp_path):
    class Reach:
        def __init__(self, *arguments):
            self.arguments = arguments

        def __reduce__(self):
            return getattr, self.arguments

    for owner, name in ((HistoryBuffer, '__init__'), (HistoryBuffer, 'register_statistics'), (torch.Tensor, 'numpy')):
        torch.save({'state_dict': {'a': torch.ones(1)}, 'meta': Reach(owner, name)}, tmp_path / 'a.pth')
        with pytest.raises(CheckpointError, match='refused: .* getattr'):
            CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'))


def test_checkpoints_of_a_run_are_read_without_mmengine(tmp_path):
    """Its logs are then nothing, and its tensors are there."""
    log = HistoryBuffer()
    log.update(3.0)
    hub = {'log_scalars': {'loss': log}, 'runtime_info': {'best_score': np.float64(7.5), 'at': slice(1, 2)}}
    torch.save({'state_dict': {'a': torch.ones(1)}, 'message_hub': hub, 'meta': {'epoch': 3}}, tmp_path / 'a.pth')
    contents = read(tmp_path / 'a.pth')
    assert contents['state_dict']['a'] == 1 and contents['meta'] == {'epoch': 3}
    assert not isinstance(contents['message_hub']['log_scalars']['loss'], HistoryBuffer)
