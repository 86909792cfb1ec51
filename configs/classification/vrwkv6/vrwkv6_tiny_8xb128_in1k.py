"""VRWKV6-T on ImageNet-1K, 8 GPUs x 128 images."""

_base_ = [
    '../_base_/models/classifier.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/schedules/adamw_300e.py',
    '../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        type='VRWKV6',
        img_size=224,
        patch_size=16,
        embed_dims=192,
        num_heads=3,
        depth=12,
    ),
    head=dict(in_channels=192),
)
