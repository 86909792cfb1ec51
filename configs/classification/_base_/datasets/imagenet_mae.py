"""ImageNet-1K at 224 for masked pre-training: crops of 0.2 to 1 of the picture and flips, 512 images per process."""

_base_ = 'mmpretrain::_base_/datasets/imagenet_bs512_mae.py'

# Workers start anew each epoch, so that a resumed run augments as an uninterrupted one would.
train_dataloader = dict(persistent_workers=False, pin_memory=True)
