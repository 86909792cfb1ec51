"""ADE20K: crops of 512 to train, 2 images per process; the short side at 512 to test, or six sizes with --tta."""

# Not mmseg::, which looks for MMSegmentation under the name of a distribution that is no longer maintained.
_base_ = __import__('mmseg').__path__[0] + '/.mim/configs/_base_/datasets/ade20k.py'

# ADE20K's masks count from 1, its data set says so: the pipelines serve masks that count from 0 as well.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2048, 512), keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32),
    dict(type='LoadAnnotations'),  # not resized: predictions are resized to it
    dict(type='PackSegInputs'),
]
# Workers start anew with each pass over the data.
train_dataloader = dict(batch_size=2, persistent_workers=False, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(persistent_workers=False, dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(persistent_workers=False, dataset=dict(pipeline=test_pipeline))

tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale=(int(2048 * r), int(512 * r)), keep_ratio=True)
                for r in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
            ],
            [dict(type='ResizeToMultiple', size_divisor=32)],
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
