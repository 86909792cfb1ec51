"""VRWKV-B on ImageNet-1K as published, optimiser and gradients spread over the GPUs by DeepSpeed, in bfloat16."""

_base_ = ['../vrwkv/vrwkv_base_16xb64_in1k.py']

strategy = dict(
    type='DeepSpeedStrategy',
    zero_optimization=dict(stage=2),
    bf16=dict(enabled=True),
    inputs_to_half=['inputs'],
    gradient_clipping=5.0,
)
optim_wrapper = dict(
    _delete_=True,
    type='DeepSpeedOptimWrapper',
    optimizer={{_base_.optim_wrapper.optimizer}},
    paramwise_cfg={{_base_.optim_wrapper.paramwise_cfg}},
)
