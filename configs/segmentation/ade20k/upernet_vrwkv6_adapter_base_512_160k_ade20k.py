"""UperNet with VRWKV6-B in a ViT-Adapter on ADE20K, 8 GPUs x 2 images.

Not trained: nobody has published figures or weights for VRWKV6 with the adapter. The recipe is that of
VRWKV-B.
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
        embed_dims=768,
        num_heads=12,
        drop_path_rate=0.3,
        post_norm=True,
        deform_num_heads=12,
        deform_ratio=0.5,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv6_b_in1k_224.pth',
        ),
    ),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)

optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.8))
