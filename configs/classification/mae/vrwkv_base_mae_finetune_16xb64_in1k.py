"""VRWKV-B, pre-trained on masked images by the config beside, fine-tuned on ImageNet-1K; 16 GPUs x 64 images.

The encoder's options are those of its pre-training. The schedule is our choice: 100 epochs, layer-wise decay.
"""

_base_ = ['../vrwkv/vrwkv_base_16xb64_in1k.py']

load_from = 'work_dirs/vrwkv_base_mae_8xb512_in1k/epoch_800.pth'

model = dict(backbone=dict(key_norm=True, drop_path_rate=0.1))

optim_wrapper = dict(
    optimizer=dict(lr=5e-4 * 1024 / 256),
    constructor='LayerDecayConstructor',
    paramwise_cfg=dict(_delete_=True, layer_decay_rate=0.65),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=5, end=100, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=100)
