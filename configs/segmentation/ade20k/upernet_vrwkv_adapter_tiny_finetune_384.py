"""UperNet with VRWKV-T as released for ADE20K, fine-tuned on your own classes at 384; one GPU, 16 images.

To adapt: data_root, classes, palette, and what is commented. See docs/finetune.md.
"""

_base_ = './upernet_vrwkv_adapter_tiny_512_160k_ade20k.py'

data_root = 'data/leaves'  # train/, val/: images; train_labels/, val_labels/: masks (PNG) of the classes' numbers
classes = ('background', 'leaf', 'flower')
palette = [[0, 0, 0], [0, 128, 0], [200, 0, 100]]

# Wholly fitted, but for the heads' last layers, which are new.
load_from = 'https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/upernet_vrwkv_adapter_tiny_512_160k_ade20k.pth'

model = dict(
    data_preprocessor=dict(size=(384, 384)),
    backbone=dict(
        init_cfg=None,  # load_from has it all
        frozen_stages=2,  # the patch and position embedding and two layers; -1: everything learns
    ),
    decode_head=dict(num_classes=len(classes)),
    auxiliary_head=dict(num_classes=len(classes)),
    test_cfg=dict(mode='slide', crop_size=(384, 384), stride=(256, 256)),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(1536, 384), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(384, 384), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1536, 384), keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
own = dict(
    _delete_=True,
    type='BaseSegDataset',
    data_root=data_root,
    metainfo=dict(classes=classes, palette=palette),
)
train_data = dict(data_prefix=dict(img_path='train', seg_map_path='train_labels'), pipeline=train_pipeline, **own)
val_data = dict(data_prefix=dict(img_path='val', seg_map_path='val_labels'), pipeline=test_pipeline, **own)
train_dataloader = dict(batch_size=16, dataset=train_data)
val_dataloader = dict(dataset=val_data)
test_dataloader = dict(dataset=val_data)

# 20,000 iterations; layer-wise decay as in the published recipe: the heads learn at lr, each layer at 0.95 of the next.
optim_wrapper = dict(optimizer=dict(lr=6e-5))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=20000),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=20000, val_interval=2000)
