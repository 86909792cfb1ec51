"""20 epochs in half precision at a global batch of 1024, for VRWKV-L."""

optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='float16',
    loss_scale='dynamic',
    optimizer=dict(type='AdamW', lr=5e-6 * 1024 / 512, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    # No 1-D tensor is decayed (norms, biases, gammas), except the two below.
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys=dict(spatial_decay=dict(decay_mult=1.0), spatial_first=dict(decay_mult=1.0)),
    ),
    clip_grad=dict(max_norm=1.0),
)

# As in adamw_300e.py, the warm-up (from 1e-8) multiplies a cosine that counts from the first iteration (to 1e-7).
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=2, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-7, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
]

train_cfg = dict(by_epoch=True, max_epochs=20, val_interval=1)
val_cfg = dict()
test_cfg = dict()

auto_scale_lr = dict(base_batch_size=1024)
