"""The models of the configs: tensors, sizes and parts."""

import pytest
import torch
from dense_configs import CONFIGS, DETECTION, DIGITS, ROWS, TENSORS, load, models, on_meta

import dense


def test_every_published_row_has_a_config():
    found = {str(path.relative_to(CONFIGS).with_suffix('')) for path in CONFIGS.glob('*/[!_]*/*adapter*.py')}
    to_adapt = {name for name in found if '_finetune' in name}
    assert set(ROWS) | set(DIGITS) == found - to_adapt and len(to_adapt) == 2
    assert len(ROWS) == 14


@pytest.mark.parametrize('name', ROWS)
def test_backbone(name):
    row, backbone = load(name), on_meta(name).backbone
    if row.tensors:
        state = {key: list(value.shape) for key, value in backbone.state_dict().items()}
        assert state == {key: list(shape) for key, shape in dict(TENSORS[row.tensors]).items()}
        assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(row.params, abs=0.06)
    kind = dense.VRWKVAdapter if row.version == 'vrwkv' else dense.VRWKV6Adapter
    assert type(backbone) is kind
    assert backbone.token_maps == ('final' if name in DETECTION else 'stages')
    assert backbone.stages == [tuple(pair) for pair in row.interactions]
    assert backbone.grid == (row.image // 16, row.image // 16)
    rates = [block.drop_path.drop_prob for block in backbone.layers]
    assert rates == pytest.approx([row.drop_path * i / (row.depth - 1) for i in range(row.depth)])
    assert backbone.interactions[0].extractor.drop_path.drop_prob == row.drop_path
    attention = backbone.interactions[0].injector.attn
    assert (attention.num_heads, attention.num_points, attention.num_levels) == (row.heads, 4, 3)
    assert attention.value_proj.out_features == int(row.dims * row.ratio)
    assert backbone.interactions[0].extractor.ffn.fc1.out_features == row.dims // 4
    config = row.cfg.model.backbone
    assert (config.get('post_norm', False), config.init_values, config.get('key_norm', False)) == row.norm
    if row.version == 'vrwkv6':
        assert config.num_heads == row.dims // 64
        assert 'Not trained' in (CONFIGS / f'{name}.py').read_text().split('"""')[1]
    start = config.init_cfg
    assert start.type == 'Pretrained' and start.checkpoint.endswith(f'/OpenGVLab/Vision-RWKV/resolve/main/{row.start}')


@pytest.mark.parametrize('name', DETECTION)
def test_mask_rcnn(name):
    row, model = load(name), on_meta(name)
    assert [conv.conv.in_channels for conv in model.neck.lateral_convs] == [row.dims] * 4
    assert model.neck.out_channels == 256 and model.neck.num_outs == 5
    assert model.roi_head.bbox_head.num_classes == model.roi_head.mask_head.num_classes == 80
    assert model.data_preprocessor.pad_size_divisor == 32
    assert type(model).__name__ == 'MaskRCNN'


@pytest.mark.parametrize('name', [name for name in ROWS if name not in DETECTION])
def test_upernet(name):
    row, model = load(name), on_meta(name)
    decode, auxiliary = model.decode_head, model.auxiliary_head
    assert (type(decode).__name__, decode.in_channels, decode.channels) == ('UPerHead', [row.dims] * 4, 512)
    assert (auxiliary.in_channels, auxiliary.channels, auxiliary.in_index) == (row.dims, 256, 2)
    assert (type(auxiliary).__name__, auxiliary.loss_decode.loss_weight) == ('FCNHead', 0.4)
    assert decode.num_classes == auxiliary.num_classes == 150
    assert model.test_cfg == {'mode': 'slide', 'crop_size': (512, 512), 'stride': (341, 341)}
    assert model.data_preprocessor.size == (512, 512)


@pytest.mark.parametrize('name', DIGITS)
def test_small_models_start_and_learn(name):
    cfg = load(name).cfg
    model = models(name).build(cfg.model)
    model.backbone.init_weights()
    maps = model.backbone(torch.randn(2, 3, 96, 160))
    assert [tuple(m.shape[2:]) for m in maps] == [(24, 40), (12, 20), (6, 10), (3, 5)]
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None for p in model.backbone.parameters())
