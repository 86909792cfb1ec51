"""The models of the configs: tensors, sizes, initial values, and what they compute."""

import pytest
import torch
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from published import CONFIGS, DIGITS, LARGE, REGULAR, ROWS, TENSORS, load

from vision_rwkv import backbones


def build(name: str, device: str = 'meta', **changes):
    """The model of a config; on the meta device it costs nothing."""
    cfg = load(name).cfg
    cfg.merge_from_dict(changes)
    with torch.device(device):
        return MODELS.build({**cfg.model, 'data_preprocessor': cfg.data_preprocessor})


def test_every_published_row_has_a_config():
    found = {str(path.relative_to(CONFIGS).with_suffix('')) for path in CONFIGS.glob('vrwkv*/*.py')}
    assert set(ROWS) | set(DIGITS) <= found


@pytest.mark.parametrize('name', ROWS)
def test_tensors_are_those_of_the_released_model(name):
    row, model = load(name), build(name)
    state = {key: list(value.shape) for key, value in model.state_dict().items()}
    classes = 21841 if 'in22k' in name else 1000
    if name in LARGE:
        head = {'layers.pre_logits': (3072, 1024), 'layers.head': (classes, 3072)}
    else:
        head = {'fc': (classes, row.dims)}
    expected = {f'backbone.{key}': shape for key, shape in TENSORS[row.tensors].items()}
    for key, shape in head.items():
        expected |= {f'head.{key}.weight': list(shape), f'head.{key}.bias': [shape[0]]}
    assert state == expected
    if row.params:
        # Published in millions with one decimal; VRWKV-B has 93.646 and was published as 93.7.
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(row.params, abs=0.06)


@pytest.mark.parametrize('name', ROWS)
def test_drop_path_and_checkpointing(name):
    row, model = load(name), build(name)
    rates = [getattr(block.drop_path, 'drop_prob', 0.0) for block in model.backbone.layers]
    depth = len(rates)
    assert rates == pytest.approx([row.drop_path * i / (depth - 1) for i in range(depth)])
    assert row.cfg.model.backbone.get('with_cp', False) == (name in LARGE)


@pytest.mark.parametrize('name', ROWS)
def test_norms_and_layer_scale(name):
    row = load(name)
    backbone = row.cfg.model.backbone
    found = (backbone.get('post_norm', False), backbone.get('init_values'), backbone.get('key_norm', False))
    assert found == row.norm
    heads = {192: 3, 384: 6, 768: 12}[row.dims] if 'vrwkv6' in name else None
    assert backbone.get('num_heads') == heads


@pytest.mark.parametrize('name', ['vrwkv/vrwkv_tiny_8xb128_in1k', 'vrwkv6/vrwkv6_tiny_8xb128_in1k', *DIGITS])
def test_small_models_train_and_predict(name):
    model = build(name, 'cpu')
    model.init_weights()
    head = model.head.fc.weight
    assert head.std().item() == pytest.approx(0.02, rel=0.1)
    assert head.abs().max() > 0.04  # so it was not PyTorch's uniform default
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    samples = [DataSample().set_gt_label(label) for label in (3, 7)]
    batch = model.data_preprocessor({'inputs': images, 'data_samples': samples}, training=True)
    loss = model(**batch, mode='loss')['loss']
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    predictions = model.eval()(**batch, mode='predict')
    classes = model.head.num_classes
    assert [p.pred_score.shape for p in predictions] == [(classes,)] * 2
    # Nearly no idea yet: the loss is that of equal probabilities.
    assert loss.item() == pytest.approx(torch.tensor(float(classes)).log().item(), abs=0.3)


@pytest.mark.parametrize('name', LARGE)
def test_head_with_a_hidden_layer(name):
    cfg = load(name).cfg
    head = MODELS.build({**cfg.model.head, 'num_classes': 50})
    head.init_weights()
    for layer in (head.layers.pre_logits, head.layers.head):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not layer.bias.any()
    x = torch.randn(4, 1024)
    first, second = head.layers.pre_logits, head.layers.head
    assert torch.allclose(head((x,)), second(first(x).tanh()))


def test_large_model_trains_with_fewer_layers():
    model = build('vrwkv/vrwkv_l_22kto1k_384', 'cpu', **{'model.backbone.depth': 1, 'model.head.num_classes': 20})
    model.init_weights()
    score = model(torch.randn(1, 3, 48, 64), mode='tensor')
    assert score.shape == (1, 20)
    score.sum().backward()


@pytest.mark.parametrize('name', REGULAR)
def test_label_smoothing(name):
    head = build(name).head
    assert type(head.loss_module).__name__ == 'LabelSmoothLoss'
    scores = torch.randn(3, 1000)
    labels = torch.tensor([0, 5, 999])
    smooth = torch.full((3, 1000), 0.1 / 1000)
    smooth[range(3), labels] += 0.9
    expected = -(smooth * scores.log_softmax(1)).sum(1).mean()
    assert head.loss_module(scores, labels).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(('name', 'arguments'), [('VRWKV', {}), ('VRWKV6', {'num_heads': 1})])
def test_registered_backbones_take_init_cfg(name, arguments, tmp_path):
    arguments = {'img_size': 32, 'patch_size': 8, 'embed_dims': 64, 'depth': 2, **arguments}
    load(DIGITS[0])
    plain = getattr(backbones, name)(**arguments)
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    init_cfg = {'type': 'Pretrained', 'checkpoint': str(tmp_path / 'plain.pth')}
    registered = MODELS.build({'type': name, 'init_cfg': init_cfg, **arguments})
    assert list(registered.state_dict()) == list(plain.state_dict())
    registered.init_weights()
    for key, value in registered.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key]), key

    without = MODELS.build({'type': name, **arguments})
    before = {key: value.clone() for key, value in without.state_dict().items()}
    without.init_weights()
    assert all(torch.equal(value, before[key]) for key, value in without.state_dict().items())
