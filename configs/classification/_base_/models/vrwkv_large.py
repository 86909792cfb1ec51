"""VRWKV-L, trained at 192: gradient checkpointing, and a head with one hidden layer."""

_base_ = './classifier.py'

model = dict(
    backbone=dict(
        type='VRWKV',
        img_size=192,
        patch_size=16,
        embed_dims=1024,
        depth=24,
        drop_path_rate=0.1,
        init_values=1e-5,
        post_norm=True,
        key_norm=True,
        with_cp=True,
    ),
    head=dict(type='HiddenLayerClsHead', in_channels=1024, hidden_dim=3072),
)
