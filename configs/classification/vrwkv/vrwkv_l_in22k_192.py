"""VRWKV-L pre-trained on ImageNet-22K at 192; 32 GPUs x 128 images.

Published: the model, the image size, AdamW, a batch of 4096 and 30 epochs. NOT published, and our choice: learning
rate, warm-up, weight decay, clipping, precision (all but the first as in the published fine-tuning), augmentation
(crop and flip), label smoothing.
"""

_base_ = [
    '../_base_/models/vrwkv_large.py',
    '../_base_/datasets/imagenet22k_192.py',
    '../_base_/schedules/adamw_large.py',
    '../_base_/default_runtime.py',
]

model = dict(head=dict(num_classes=21841))

optim_wrapper = dict(optimizer=dict(lr=1e-3))  # ours
param_scheduler = [  # ours
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=2, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=0, end=30, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=30)
auto_scale_lr = dict(base_batch_size=4096)

# ImageNet-22K has no validation split: no validation, no best checkpoint.
val_cfg = None
test_cfg = None
default_hooks = dict(checkpoint=dict(save_best=None))
