"""A small VRWKV6 on handwritten digits: the demo, a minute or two on two CPU cores."""

_base_ = [
    '../_base_/models/classifier.py',
    '../_base_/datasets/digits.py',
    '../_base_/schedules/adamw_digits.py',
    '../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(type='VRWKV6', img_size=32, patch_size=4, embed_dims=64, num_heads=1, depth=4),
    head=dict(num_classes=10, in_channels=64),
)

default_hooks = dict(logger=dict(interval=10))
