"""VRWKV-B on ImageNet-1K as published, parameters and optimiser spread over the GPUs by FSDP."""

_base_ = ['../vrwkv/vrwkv_base_16xb64_in1k.py']

strategy = dict(
    type='FSDPStrategy',
    model_wrapper=dict(type='MMFullyShardedDataParallel', use_orig_params=True, auto_wrap_policy='each_block'),
    state_dict_cfg='full',  # one file a checkpoint, for tools/test.py and everything else
)
optim_wrapper = dict(type='ShardedOptimWrapper')
