"""ImageNet-1K at 224: MMPretrain's Swin pipeline (RandAugment, erasing), 128 images per process."""

_base_ = 'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py'

# Workers start anew each epoch (no persistent_workers): their random state then depends on the epoch alone, and a
# resumed run augments as an uninterrupted one would. default_collate stacks images in the workers.
loader = dict(batch_size=128, num_workers=8, pin_memory=True, collate_fn=dict(type='default_collate'))
train_dataloader = loader
val_dataloader = loader
test_dataloader = loader
