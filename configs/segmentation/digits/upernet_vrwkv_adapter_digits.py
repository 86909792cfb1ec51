"""A small UperNet on scenes of handwritten digits: the demo, minutes on two CPU cores."""

_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/datasets/digits.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/adamw_digits.py',
]

class_weight = [0.4] + [1.0] * 10  # four of five pixels are background

model = dict(
    data_preprocessor=dict(size=(160, 160)),
    backbone=dict(
        img_size=160,
        embed_dims=64,
        depth=4,
        init_values=1.0,
        conv_inplane=32,
        deform_num_heads=2,
        deform_ratio=0.5,
        interaction_indexes=[[0, 0], [1, 1], [2, 2], [3, 3]],
    ),
    decode_head=dict(
        in_channels=[64, 64, 64, 64],
        channels=64,
        num_classes=11,
        loss_decode=dict(class_weight=class_weight),
    ),
    auxiliary_head=dict(in_channels=64, channels=32, num_classes=11, loss_decode=dict(class_weight=class_weight)),
    test_cfg=dict(_delete_=True, mode='whole'),
)
