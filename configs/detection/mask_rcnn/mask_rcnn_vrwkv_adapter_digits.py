"""A small Mask R-CNN on scenes of handwritten digits: the demo, minutes on two CPU cores."""

_base_ = [
    '../_base_/models/mask_rcnn.py',
    '../_base_/datasets/digits.py',
    '../_base_/schedules/adamw_digits.py',
    '../_base_/default_runtime.py',
]

model = dict(
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
    neck=dict(in_channels=[64, 64, 64, 64], out_channels=64, num_outs=4),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32]),  # digits are 20 to 90 pixels high
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, num_classes=10),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=96)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(max_per_img=20)),
)

default_hooks = dict(logger=dict(interval=25))
