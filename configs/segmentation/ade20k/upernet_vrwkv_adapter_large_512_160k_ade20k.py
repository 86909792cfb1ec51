"""UperNet with VRWKV-L in a ViT-Adapter on ADE20K, 8 GPUs x 2 images."""

_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/adamw_160k.py',
]

model = dict(
    backbone=dict(
        img_size=192,
        embed_dims=1024,
        depth=24,
        drop_path_rate=0.4,
        post_norm=True,
        key_norm=True,
        deform_num_heads=16,
        deform_ratio=0.5,
        interaction_indexes=[[0, 5], [6, 11], [12, 17], [18, 23]],
        with_cp=True,  # for memory; the values are the same
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv_l_in22k_192.pth',
        ),
    ),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024]),
    auxiliary_head=dict(in_channels=1024),
)

optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.9))
