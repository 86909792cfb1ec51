"""A small VRWKV pre-trained on masked handwritten digits: a few minutes on two CPU cores."""

_base_ = ['../_base_/models/mae.py', '../_base_/datasets/digits.py', '../_base_/default_runtime.py']

small = dict(img_size=32, patch_size=4)
model = dict(
    backbone=dict(embed_dims=64, depth=4, drop_path_rate=0.0, init_values=1.0, **small),
    neck=dict(embed_dims=64, decoder_dims=64, depth=2, **small),
    head=dict(patch_size=4),
)

data_preprocessor = dict(_delete_=True, type='SelfSupDataPreprocessor', mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True)
train_dataloader = dict(batch_size=64)
val_dataloader = None
val_evaluator = None
test_dataloader = None
test_evaluator = None

optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys=dict(mask_token=dict(decay_mult=0.0))),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=True, begin=0, end=4, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=True, begin=4, end=60, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=60)

default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=10, save_best=None))
