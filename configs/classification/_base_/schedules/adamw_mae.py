"""800 epochs at a global batch of 4096."""

optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=1.5e-4 * 4096 / 256, betas=(0.9, 0.95), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys=dict(mask_token=dict(decay_mult=0.0))),
)

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-9, by_epoch=True, begin=0, end=10, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=True, begin=10, end=800, convert_to_iter_based=True),
]

train_cfg = dict(by_epoch=True, max_epochs=800)

auto_scale_lr = dict(base_batch_size=4096)
