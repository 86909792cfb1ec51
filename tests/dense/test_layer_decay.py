"""Layer-wise learning-rate decay: the groups of T against a table written by hand, for both tasks."""

import pytest
from dense_configs import on_meta
from mmengine.optim import build_optim_wrapper
from torch import nn

from openmmlab import LayerDecayConstructor

DET = 'detection/mask_rcnn/mask_rcnn_vrwkv_adapter_tiny_fpn_1x_coco'
SEG = 'segmentation/ade20k/upernet_vrwkv_adapter_tiny_512_160k_ade20k'
# 0.85 ** (13 - group) for the groups 0 to 13 of twelve layers.
RATES = [0.120905, 0.142242, 0.167343, 0.196874, 0.231617, 0.272491, 0.320577, 0.377150, 0.443705, 0.522006, 0.614125]
RATES += [0.7225, 0.85, 1.0]

STEM = {'patch_embed.projection.weight': True, 'patch_embed.projection.bias': False, 'pos_embed': True}
# What a layer has, and whether it is decayed.
LAYER = {f'{norm}.{kind}': False for norm in ('ln1', 'ln2') for kind in ('weight', 'bias')}
LAYER |= {'gamma1': False, 'gamma2': False, 'att.spatial_decay': False, 'att.spatial_first': False}
LAYER |= {f'att.spatial_mix_{x}': True for x in 'kvr'} | {f'ffn.spatial_mix_{x}': True for x in 'kr'}
LAYER |= {f'att.{x}.weight': True for x in ('key', 'value', 'receptance', 'output')}
LAYER |= {f'ffn.{x}.weight': True for x in ('key', 'value', 'receptance')}
# Some of what has the full rate.
OTHERS = {
    'backbone.level_embed': True,
    'backbone.spm.stem.0.weight': True,
    'backbone.spm.stem.1.weight': False,
    'backbone.spm.fc4.bias': False,
    'backbone.interactions.0.injector.gamma': False,
    'backbone.interactions.0.injector.query_norm.weight': False,
    'backbone.interactions.3.extra_extractors.1.attn.value_proj.weight': True,
    'backbone.interactions.3.extra_extractors.1.attn.sampling_offsets.bias': False,
    'backbone.interactions.2.extractor.ffn.dwconv.dwconv.weight': True,
    'backbone.up.weight': True,
    'backbone.norm1.weight': False,
}
OTHERS_OF = {
    DET: {
        'neck.lateral_convs.0.conv.weight': True,
        'rpn_head.rpn_cls.bias': False,
        'roi_head.bbox_head.fc_cls.weight': True,
    },
    SEG: {
        'decode_head.conv_seg.weight': True,
        'auxiliary_head.conv_seg.bias': False,
        'decode_head.bottleneck.bn.weight': False,
    },
}


def groups_of(name: str, rate: float, weight_decay: float = 0.05) -> dict[str, dict]:
    """{parameter name: its optimiser group}; the learning rate is 1."""
    model = on_meta(name)
    wrapper = build_optim_wrapper(
        model,
        {
            'optimizer': {'type': 'AdamW', 'lr': 1.0, 'weight_decay': weight_decay},
            'constructor': 'LayerDecayConstructor',
            'paramwise_cfg': {'layer_decay_rate': rate},
        },
    )
    owners = {id(p): group for group in wrapper.param_groups for p in group['params']}
    assert sum(len(group['params']) for group in wrapper.param_groups) == len(owners)
    return {key: owners[id(p)] for key, p in model.named_parameters()}


@pytest.mark.parametrize('name', [DET, SEG])
def test_groups_of_t_are_those_of_the_table(name):
    table = {f'backbone.{key}': (0, decayed) for key, decayed in STEM.items()}
    for layer in range(12):
        table |= {f'backbone.layers.{layer}.{key}': (layer + 1, decayed) for key, decayed in LAYER.items()}
    table |= {f'backbone.layers.0.ln0.{kind}': (1, False) for kind in ('weight', 'bias')}
    slower = set(table)
    table |= {key: (13, decayed) for key, decayed in (OTHERS | OTHERS_OF[name]).items()}
    groups = groups_of(name, 0.85)
    for key, (number, decayed) in table.items():
        assert groups[key]['lr'] == pytest.approx(RATES[number], abs=1e-6), key
        assert groups[key]['weight_decay'] == (0.05 if decayed else 0), key
    assert {key for key, group in groups.items() if group['lr'] != 1} == slower
    for key, parameter in on_meta(name).named_parameters():
        assert (groups[key]['weight_decay'] > 0) == (parameter.ndim > 1), key


def test_one_group_for_each_rate_and_decay():
    groups = {id(group): group for group in groups_of(DET, 0.5).values()}.values()
    assert len(groups) == 2 * 14
    assert len({(group['lr'], group['weight_decay']) for group in groups}) == 28


def test_another_depth_and_frozen_parameters():
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
    model.backbone.pos_embed = nn.Parameter(model.backbone.layers[0].weight.data.clone())
    model.backbone.layers[1].weight.requires_grad_(False)
    model.head = nn.Linear(2, 2)
    optimizer = {'type': 'AdamW', 'lr': 8.0, 'weight_decay': 0.1}
    wrapper = LayerDecayConstructor({'optimizer': optimizer}, {'layer_decay_rate': 0.5})(model)
    rates = {id(p): group['lr'] for group in wrapper.param_groups for p in group['params']}
    found = {key: rates.get(id(p)) for key, p in model.named_parameters()}
    layers = {'backbone.layers.0.weight': 1.0, 'backbone.layers.1.weight': None, 'backbone.layers.2.weight': 4.0}
    assert found == {'backbone.pos_embed': 0.5, **layers, 'head.weight': 8.0, 'head.bias': 8.0}


@pytest.mark.parametrize('settings', [{}, {'layer_decay_rate': 0}, {'layer_decay_rate': 1.5}, {'layer_decay': 0.9}])
def test_settings(settings):
    optimizer = {'type': 'AdamW', 'lr': 1.0, 'weight_decay': 0.1}
    with pytest.raises(ValueError, match=r'paramwise_cfg must be dict\(layer_decay_rate=RATE\)'):
        LayerDecayConstructor({'optimizer': optimizer}, settings)
    with pytest.raises(ValueError, match='needs lr and weight_decay'):
        LayerDecayConstructor({'optimizer': {'type': 'AdamW', 'lr': 1.0}}, {'layer_decay_rate': 0.5})
