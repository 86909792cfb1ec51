"""scikit-learn's handwritten digits as written by tools/make_digits.py: 32x32 pictures, 32 per process.

So small that reading them in the training process is faster than starting workers each epoch.
"""

data_root = 'data/digits'
data_preprocessor = dict(num_classes=10, mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='RandAugment',
        policies=[
            dict(type='Rotate', magnitude_range=(0, 20)),
            dict(type='Shear', magnitude_range=(0, 0.2), direction='horizontal'),
            dict(type='Shear', magnitude_range=(0, 0.2), direction='vertical'),
            dict(type='Translate', magnitude_range=(0, 0.15), direction='horizontal'),
            dict(type='Translate', magnitude_range=(0, 0.15), direction='vertical'),
        ],
        num_policies=2,
        magnitude_level=6,
        magnitude_std='inf',
        hparams=dict(pad_val=0, interpolation='bilinear'),
    ),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]

train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='CustomDataset', data_root=data_root, data_prefix='train', pipeline=train_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=0,
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='CustomDataset', data_root=data_root, data_prefix='val', pipeline=test_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_dataloader = val_dataloader
test_evaluator = val_evaluator
