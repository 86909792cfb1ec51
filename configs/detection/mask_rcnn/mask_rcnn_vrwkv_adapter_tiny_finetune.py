"""Mask R-CNN with VRWKV-T as released for COCO, fine-tuned on your own classes at 1024x640; one GPU, 8 images.

To adapt: data_root, classes, and what is commented. See docs/finetune.md.
"""

_base_ = './mask_rcnn_vrwkv_adapter_tiny_fpn_1x_coco.py'

data_root = 'data/balloons/'  # COCO's format: train.json and val.json beside the folders of their images
classes = ('balloon',)

# Wholly fitted, but for the heads' last layers, which are new.
load_from = 'https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/mask_rcnn_vrwkv_adapter_tiny_fpn_1x_coco.pth'

model = dict(
    backbone=dict(
        init_cfg=None,  # load_from has it all
        frozen_stages=2,  # the patch and position embedding and two layers; -1: everything learns
    ),
    roi_head=dict(bbox_head=dict(num_classes=len(classes)), mask_head=dict(num_classes=len(classes))),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(1024, 640), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1024, 640), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
own = dict(data_root=data_root, metainfo=dict(classes=classes))
val = dict(ann_file='val.json', data_prefix=dict(img='val/'), pipeline=test_pipeline, **own)
train_dataloader = dict(
    batch_size=8,
    dataset=dict(ann_file='train.json', data_prefix=dict(img='train/'), pipeline=train_pipeline, **own),
)
val_dataloader = dict(dataset=val)
test_dataloader = dict(dataset=val)
val_evaluator = dict(ann_file=data_root + 'val.json')
test_evaluator = val_evaluator

# Layer-wise decay as in the published recipe: the heads learn at lr, each layer at 0.85 of the one above it.
optim_wrapper = dict(optimizer=dict(lr=1e-4))
