"""Mask R-CNN with VRWKV-S in a ViT-Adapter on COCO, 8 GPUs x 2 images."""

_base_ = [
    '../_base_/models/mask_rcnn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_1x.py',
    '../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        embed_dims=384,
        drop_path_rate=0.2,
        post_norm=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv_s_in1k_224.pth',
        ),
    ),
    neck=dict(in_channels=[384, 384, 384, 384]),
)
