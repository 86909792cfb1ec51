"""VRWKV-T as released for ImageNet-1K at 224, fine-tuned on your own images at 384; one GPU, 64 images.

To adapt: data_root, classes, and what is commented. See docs/finetune.md.
"""

_base_ = [
    '../_base_/models/classifier.py',
    '../_base_/datasets/imagenet_384.py',
    '../_base_/default_runtime.py',
]

data_root = 'data/flowers'  # train/CLASS/*.jpg and val/CLASS/*.jpg
classes = 5

# Wholly fitted, but for the head's last layer, which is new; the position embedding is resized to 384.
load_from = 'https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv_t_in1k_224.pth'

model = dict(
    backbone=dict(
        type='VRWKV',
        img_size=384,
        patch_size=16,
        embed_dims=192,
        depth=12,
        frozen_stages=2,  # the patch and position embedding and two layers; -1: everything learns
    ),
    head=dict(in_channels=192, num_classes=classes),
)
data_preprocessor = dict(num_classes=classes)

dataset = dict(_delete_=True, type='CustomDataset', data_root=data_root)
train_dataloader = dict(batch_size=64, dataset=dict(data_prefix='train', pipeline={{_base_.train_pipeline}}, **dataset))
val_dataloader = dict(batch_size=64, dataset=dict(data_prefix='val', pipeline={{_base_.test_pipeline}}, **dataset))
test_dataloader = val_dataloader

# Layer-wise decay: the head learns at lr, each layer below at 0.75 of the one above it.
optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=5e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor='LayerDecayConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.75),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=2, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=2, end=20, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=20, val_interval=1)
val_cfg = dict()
test_cfg = dict()

auto_scale_lr = dict(base_batch_size=64)
