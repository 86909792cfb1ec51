"""What training keeps of a layer: fewer bytes than a ViT layer does, because cheap values are recomputed."""

import pytest
import timm
import torch

from vision_rwkv.backbones import VRWKV

BATCH = 2
VIT = {192: 'deit_tiny_patch16_224', 768: 'deit_base_patch16_224'}


def saved_bytes(model, forward) -> int:
    """Bytes of the tensors that autograd keeps, each storage once; parameters and their casts left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, storages = [], {}

    def keep(x):
        kept.append(x)  # so that no storage is used twice
        storage = x.untyped_storage()
        # A ViT's linear layers flatten the batch.
        if storage.data_ptr() not in parameters and x.shape[0] in (BATCH, BATCH * 197):
            storages[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast('cpu', torch.bfloat16):
        forward(torch.randn(BATCH, 3, 224, 224))
    return sum(storages.values())


def units_a_layer(make, forward, dim: int) -> float:
    """What a second layer adds, in bfloat16 tensors (B, T, C)."""
    models = [make(depth).train() for depth in (1, 2)]
    one, two = (saved_bytes(model, lambda x, model=model: forward(model, x)) for model in models)
    return (two - one) / (2 * BATCH * 196 * dim)


@pytest.mark.parametrize(
    ('dim', 'options', 'most'), [(192, {}, 14.1), (768, {'post_norm': True, 'init_values': 1e-5}, 15.1)]
)
def test_a_layer_keeps_less_than_a_vit_layer(dim, options, most):
    ours = units_a_layer(lambda depth: VRWKV(embed_dims=dim, depth=depth, **options), lambda m, x: m(x), dim)
    vit = units_a_layer(
        lambda depth: timm.create_model(VIT[dim], depth=depth, num_classes=0), lambda m, x: m.forward_features(x), dim
    )
    assert 17 < vit < 19
    assert ours < most
