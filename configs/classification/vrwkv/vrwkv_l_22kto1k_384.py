"""VRWKV-L, pre-trained on ImageNet-22K at 192, fine-tuned on ImageNet-1K at 384; 8 GPUs x 128 images.

Set `load_from` to the pre-trained checkpoint. The position embedding stays on the 12x12 grid of 192 pixels and is
resized inside the model.
"""

_base_ = [
    '../_base_/models/vrwkv_large.py',
    '../_base_/datasets/imagenet_384.py',
    '../_base_/schedules/adamw_large.py',
    '../_base_/default_runtime.py',
]

# Mixup on half of the batches, no cutmix.
model = dict(train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8)], probs=[0.5]))

custom_hooks = [dict(type='EMAHook', momentum=1e-4, priority='ABOVE_NORMAL')]
