"""160,000 iterations at a global batch of 16 in float16, layer-wise learning-rate decay, no clipping."""

# Not mmseg::, which looks for MMSegmentation under the name of a distribution that is no longer maintained.
_base_ = __import__('mmseg').__path__[0] + '/.mim/configs/_base_/schedules/schedule_160k.py'

optim_wrapper = dict(
    _delete_=True,
    type='AmpOptimWrapper',
    dtype='float16',
    loss_scale=dict(init_scale=512.0),  # dynamic from there
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    constructor='LayerDecayConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.85),
)

# The polynomial counts from the first iteration and the warm-up multiplies it, as in the published runs.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=160000),
]

default_hooks = dict(checkpoint=dict(save_best='mIoU', max_keep_ckpts=3))
auto_scale_lr = dict(enable=False, base_batch_size=16)
