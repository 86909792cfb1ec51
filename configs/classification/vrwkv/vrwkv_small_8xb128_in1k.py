"""VRWKV-S on ImageNet-1K, 8 GPUs x 128 images; mixup or cutmix on every batch."""

_base_ = [
    '../_base_/models/classifier.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/schedules/adamw_300e.py',
    '../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        type='VRWKV',
        img_size=224,
        patch_size=16,
        embed_dims=384,
        depth=12,
        drop_path_rate=0.3,
        post_norm=True,
        init_values=1,
    ),
    head=dict(in_channels=384),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
