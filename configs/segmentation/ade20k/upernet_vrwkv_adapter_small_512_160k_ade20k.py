"""UperNet with VRWKV-S in a ViT-Adapter on ADE20K, 8 GPUs x 2 images."""

_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/adamw_160k.py',
]

model = dict(
    backbone=dict(
        embed_dims=384,
        drop_path_rate=0.2,
        post_norm=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv_s_in1k_224.pth',
        ),
    ),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
