"""UperNet on the adapter; a config adds what differs with the size of the backbone, and the heads' in_channels."""

# Not mmseg::, which looks for MMSegmentation under the name of a distribution that is no longer maintained.
_base_ = __import__('mmseg').__path__[0] + '/.mim/configs/_base_/models/upernet_r50.py'

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='VRWKV_Adapter',
        img_size=224,
        patch_size=16,
        depth=12,
        init_values=1e-5,
        conv_inplane=64,
        n_points=4,
        deform_num_heads=6,
        cffn_ratio=0.25,
        deform_ratio=1.0,
        interaction_indexes=[[0, 2], [3, 5], [6, 8], [9, 11]],
    ),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)),
)
