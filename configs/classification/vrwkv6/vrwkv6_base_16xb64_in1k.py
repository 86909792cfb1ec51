"""VRWKV6-B on ImageNet-1K, 16 GPUs x 64 images; mixup or cutmix on every batch."""

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
        embed_dims=768,
        num_heads=12,
        depth=12,
        drop_path_rate=0.5,
        post_norm=True,
        init_values=1e-5,
    ),
    head=dict(in_channels=768),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)

train_dataloader = dict(batch_size=64)
val_dataloader = dict(batch_size=64)
test_dataloader = dict(batch_size=64)
