"""UperNet with VRWKV6-T in a ViT-Adapter on ADE20K, 8 GPUs x 2 images.

Not trained: nobody has published figures or weights for VRWKV6 with the adapter. The recipe is that of
VRWKV-T.
"""

_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/adamw_160k.py',
]

model = dict(
    backbone=dict(
        type='VRWKV6_Adapter',
        embed_dims=192,
        num_heads=3,
        drop_path_rate=0.1,
        init_values=1.0,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv6_t_in1k_224.pth',
        ),
    ),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192),
)

optim_wrapper = dict(optimizer=dict(lr=12e-5), paramwise_cfg=dict(layer_decay_rate=0.95))
