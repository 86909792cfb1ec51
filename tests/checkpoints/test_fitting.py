"""Strict: whatever does not fit is named, and then nothing is loaded; what may differ to start from a checkpoint."""

import pytest
import torch
from released import conv_bn, linear, mask_rcnn, ours, shapes_of, shell, tensors_of, upernet
from torch import nn

from vision_rwkv.backbones import VRWKV
from vision_rwkv.checkpoints import CheckpointError, fit, load


class Classifier(nn.Module):
    """A small backbone and a head."""

    def __init__(self, classes=10, img_size=32, **arguments):
        super().__init__()
        self.backbone = VRWKV(**{'img_size': img_size, 'patch_size': 8, 'embed_dims': 16, 'depth': 2, **arguments})
        self.head = nn.ModuleDict({'fc': nn.Linear(16, classes)})


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, before):
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_every_problem_is_named_and_nothing_is_loaded(tmp_path):
    state = copy_of(Classifier())
    del state['backbone.layers.0.ln1.weight'], state['head.fc.bias']
    state['backbone.extra'] = state['other.extra'] = torch.zeros(3)
    state['backbone.layers.1.att.key.weight'] = torch.zeros(16, 8)
    torch.save({'state_dict': state}, tmp_path / 'a.pth')
    model = Classifier()
    before = copy_of(model)
    for start in (False, True):
        with pytest.raises(CheckpointError) as error:
            load(model, tmp_path / 'a.pth', start)
        message = str(error.value)
        assert message.startswith(f'{tmp_path}/a.pth: it does not fit the model: ')
        assert 'missing from the file: backbone.layers.0.ln1.weight, head.fc.bias;' in message
        assert f'unexpected in the file: backbone.extra{"" if start else ", other.extra"};' in message
        assert 'backbone.layers.1.att.key.weight has the shape (16, 8) in the file, (16, 16) in the model' in message
        assert_untouched(model, before)


def test_loading_is_whole(tmp_path):
    source, model = Classifier(), Classifier()
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'a.pth')
    assert load(model, tmp_path / 'a.pth').new == []
    assert_untouched(model, source.state_dict())


def test_position_embedding_on_another_grid():
    source, model = Classifier(), Classifier(img_size=48)
    nn.init.normal_(source.backbone.pos_embed)
    fitted = fit(source.state_dict(), model).tensors['backbone.pos_embed']
    image = torch.randn(1, 3, 48, 48)
    model.load_state_dict(source.state_dict() | {'backbone.pos_embed': fitted})
    assert torch.allclose(model.backbone(image)[0], source.backbone(image)[0], atol=1e-6)
    odd = source.state_dict() | {'backbone.pos_embed': torch.zeros(1, 15, 16)}
    with pytest.raises(CheckpointError, match='a square grid to resize, got 15 positions'):
        fit(odd, model)
    narrow = source.state_dict() | {'backbone.pos_embed': torch.zeros(1, 16, 8)}
    with pytest.raises(CheckpointError, match=r'pos_embed has the shape \(1, 16, 8\)'):
        fit(narrow, model)


def test_other_classes_need_start():
    source, model = Classifier(), Classifier(classes=7)
    with pytest.raises(CheckpointError, match=r'head\.fc\.weight .*head\.fc\.bias'):
        fit(source.state_dict(), model)
    fitted = fit(source.state_dict(), model, start=True)
    assert fitted.new == fitted.left_over == ['head.fc.weight', 'head.fc.bias']
    assert len(fitted.tensors) == len(model.state_dict()) - 2


@pytest.mark.parametrize(('dense', 'rest'), [('adapter_t_det', mask_rcnn(192)), ('adapter_t_seg', upernet(192))])
def test_a_dense_model_starts_from_a_classifier(dense, rest):
    model, state = ours(dense), tensors_of('vrwkv_t')
    with pytest.raises(CheckpointError):
        fit({'state_dict': state}, model)
    fitted = fit({'state_dict': state}, model, start=True)
    assert set(fitted.left_over) == {
        f'{name}.{item}' for name in ('backbone.ln1', 'head.fc') for item in ('weight', 'bias')
    }
    assert set(rest) < set(fitted.new)
    scales = {name for name in fitted.new if name.startswith('backbone.layers')}
    assert scales == {f'backbone.layers.{i}.{scale}' for i in range(12) for scale in ('gamma1', 'gamma2')}
    assert any(name.startswith('backbone.interactions') for name in fitted.new)
    del state['backbone.layers.3.ln2.bias']
    with pytest.raises(CheckpointError, match=r'missing from the file: backbone\.layers\.3\.ln2\.bias$'):
        fit({'state_dict': state}, model, start=True)


def test_new_layer_scales_must_be_neutral():
    source = Classifier().state_dict()
    assert len(fit(source, Classifier(init_values=1.0), start=True).new) == 4
    for model, start in ((Classifier(init_values=1e-5), True), (Classifier(init_values=1.0), False)):
        with pytest.raises(CheckpointError, match=r'missing from the file: backbone\.layers\.0\.gamma1, '):
            fit(source, model, start)


def test_a_dense_model_starts_from_one_with_other_classes():
    shapes = {name: shape for name, shape in shapes_of('adapter_t_det').items() if name.startswith('backbone.')}
    fitted = fit({'state_dict': tensors_of('adapter_t_det')}, shell(shapes | mask_rcnn(192, classes=10)), start=True)
    last = linear('roi_head.bbox_head.fc_cls', 1, 1) | linear('roi_head.bbox_head.fc_reg', 1, 1)
    assert set(fitted.new) == set(last | linear('roi_head.mask_head.conv_logits', 1, 1))
    narrow = shell(shapes | mask_rcnn(192) | linear('rpn_head.rpn_conv', 256, 128, 3, 3))
    with pytest.raises(CheckpointError, match=r'rpn_head\.rpn_conv\.weight has the shape'):
        fit({'state_dict': tensors_of('adapter_t_det')}, narrow, start=True)
    without = shell(shapes | mask_rcnn(192) | conv_bn('rpn_head.more', 8, 8, 1))
    with pytest.raises(CheckpointError, match=r'missing from the file: rpn_head\.more\.conv\.weight'):
        fit({'state_dict': tensors_of('adapter_t_det')}, without, start=True)


def test_a_file_of_something_else():
    with pytest.raises(CheckpointError, match='missing from the file: backbone.pos_embed'):
        fit({'state_dict': {'fc.weight': torch.zeros(3)}}, Classifier(), start=True)
    with pytest.raises(CheckpointError, match='no tensor in common'):
        fit({'fc.weight': torch.zeros(3)}, nn.Sequential(nn.Linear(2, 2)), start=True)
