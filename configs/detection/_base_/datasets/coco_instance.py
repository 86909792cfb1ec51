"""COCO at 1333x800, 2 images per process."""

_base_ = 'mmdet::_base_/datasets/coco_instance.py'

# Workers start anew each epoch: a resumed run then augments as an uninterrupted one would.
train_dataloader = dict(persistent_workers=False)
val_dataloader = dict(persistent_workers=False)
test_dataloader = dict(persistent_workers=False)
