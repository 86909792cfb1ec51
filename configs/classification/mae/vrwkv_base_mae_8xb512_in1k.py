"""VRWKV-B pre-trained on masked ImageNet-1K, 8 GPUs x 512 images. Fine-tune with key_norm, as in the config beside."""

_base_ = [
    '../_base_/models/mae.py',
    '../_base_/datasets/imagenet_mae.py',
    '../_base_/schedules/adamw_mae.py',
    '../_base_/default_runtime.py',
]

model = dict(backbone=dict(embed_dims=768), neck=dict(embed_dims=768))

default_hooks = dict(checkpoint=dict(save_best=None))
