"""Masked pre-training: the published encoder, 8 VRWKV blocks of width 512 as decoder; raw pixels are the target."""

model = dict(
    type='MAE',
    backbone=dict(
        type='MaskedVRWKV',
        img_size=224,
        patch_size=16,
        depth=12,
        drop_path_rate=0.1,
        post_norm=True,
        init_values=1e-5,
        key_norm=True,
        mask_ratio=0.75,
    ),
    neck=dict(type='VRWKVDecoder', img_size=224, patch_size=16, decoder_dims=512, depth=8),
    head=dict(
        type='MAEPretrainHead',
        norm_pix=False,
        patch_size=16,
        loss=dict(type='PixelReconstructionLoss', criterion='L2'),
    ),
)
