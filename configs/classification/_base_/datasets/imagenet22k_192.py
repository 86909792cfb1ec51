"""ImageNet-22K at 192 for pre-training: random crop and flip only, 128 images per process, no validation set."""

data_preprocessor = dict(
    num_classes=21841,
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    to_rgb=True,
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=192, backend='pillow', interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    pin_memory=True,
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='CustomDataset', data_root='data/imagenet22k', data_prefix='train', pipeline=train_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=True),
)
