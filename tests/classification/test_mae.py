"""Masked pre-training: what the encoder sees, what the decoder gets, and that a classifier can start from it."""

import pytest
import torch
from mmengine.config import Config
from mmpretrain.registry import MODELS
from published import CONFIGS, load
from torch._subclasses.fake_tensor import FakeTensorMode

from classification.mae import MaskedVRWKV, VRWKVDecoder, draw_mask, pick
from vision_rwkv.checkpoints import fit

SMALL = {'img_size': 32, 'patch_size': 8, 'embed_dims': 16, 'depth': 2, 'post_norm': True, 'key_norm': True}


def load_mae(name):
    load('vrwkv/vrwkv_digits')  # its scope is ours too
    return Config.fromfile(CONFIGS / 'mae' / f'{name}.py')


def test_mask():
    kept, places, mask = draw_mask(3, 16, 0.75, torch.device('cpu'))
    assert kept.shape == (3, 4) and places.shape == mask.shape == (3, 16)
    for image in range(3):
        numbers = kept[image].tolist()
        assert numbers == sorted(numbers) and len(set(numbers)) == 4  # raster order
        assert [i for i in range(16) if not mask[image, i]] == numbers
        assert [places[image, i].item() for i in numbers] == [0, 1, 2, 3]
        assert sorted(places[image].tolist()) == list(range(16))
    assert len({tuple(numbers) for numbers in draw_mask(50, 16, 0.75, torch.device('cpu'))[0].tolist()}) > 10


def test_the_encoder_sees_kept_patches_alone():
    model = MaskedVRWKV(**SMALL).eval()
    assert not model.pos_embed.requires_grad and model.pos_embed.abs().max() == 1
    assert len({tuple(row) for row in model.pos_embed[0].tolist()}) == 16
    x = torch.randn(2, 3, 32, 32)
    torch.manual_seed(3)
    tokens, mask, places = model(x)
    assert tokens.shape == (2, 4, 16)
    hidden = mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = torch.where(hidden.bool(), torch.randn_like(x), x)
    torch.manual_seed(3)
    again, _, again_places = model(other)
    assert torch.equal(tokens, again) and torch.equal(places, again_places)
    maps = model(x, mask=None)
    assert maps[0].shape == (2, 16, 4, 4)


def test_kept_patches_are_shifted_from_the_previous_one():
    """What a first layer that only shifts gives to each kept patch is the one kept before it."""
    model = MaskedVRWKV(**{**SMALL, 'depth': 1}).eval()
    layer = model.layers[0]
    seen = []
    layer.att.value.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        layer.att.spatial_mix_v.zero_()
    x = torch.randn(1, 3, 32, 32)
    torch.manual_seed(0)
    _, mask, _ = model(x)
    kept = (mask[0] == 0).nonzero()[:, 0]
    tokens = layer.ln0(pick(model.embed(x)[0], kept[None]))  # post-norm: the mix takes them as they are
    assert torch.equal(seen[0][0, 0], torch.zeros(16)) and torch.equal(seen[0][0, 1:], tokens[0, :-1])


def test_the_decoder_puts_patches_in_their_places():
    model = VRWKVDecoder(embed_dims=16, decoder_dims=32, depth=2, img_size=32, patch_size=8)
    assert not model.pos_embed.requires_grad
    seen = []
    model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs))
    tokens = torch.randn(2, 4, 16)
    kept, places, _ = draw_mask(2, 16, 0.75, torch.device('cpu'))
    pixels = model(tokens, places)
    assert pixels.shape == (2, 16, 8 * 8 * 3)
    sequence, hw, _ = seen[0]
    assert hw == (4, 4)
    content = sequence - model.pos_embed
    assert torch.allclose(pick(content, kept), model.decoder_embed(tokens), atol=1e-6)
    masked = torch.ones(2, 16).scatter_(1, kept, 0).bool()
    assert torch.allclose(content[masked], model.mask_token[0].expand(24, -1), atol=1e-6)


@pytest.mark.parametrize(('name', 'dims'), [('vrwkv_base_mae_8xb512_in1k', 768), ('vrwkv_tiny_mae_8xb512_in1k', 192)])
def test_published_recipe(name, dims):
    cfg = load_mae(name)
    backbone = cfg.model.backbone
    options = ('embed_dims', 'depth', 'post_norm', 'init_values', 'key_norm', 'drop_path_rate', 'mask_ratio')
    assert tuple(backbone[option] for option in options) == (dims, 12, True, 1e-5, True, 0.1, 0.75)
    assert (cfg.model.neck.decoder_dims, cfg.model.neck.depth, cfg.model.head.norm_pix) == (512, 8, False)
    with FakeTensorMode():
        model = MODELS.build(cfg.model)
    assert [type(part).__name__ for part in (model, model.backbone, model.neck)] == [
        'MAE',
        'MaskedVRWKV',
        'VRWKVDecoder',
    ]
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (2.4e-3, (0.9, 0.95), 0.05)
    warmup, cosine = cfg.param_scheduler
    assert (warmup.end, cosine.begin, cosine.end, cfg.train_cfg.max_epochs) == (10, 10, 800, 800)
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 4096
    crop, flip = cfg.train_dataloader.dataset.pipeline[1:3]
    assert crop.crop_ratio_range == (0.2, 1.0) and flip.type == 'RandomFlip'


def test_a_small_model_learns_and_starts_a_classifier():
    cfg = load_mae('vrwkv_mae_digits')
    model = MODELS.build({**cfg.model, 'data_preprocessor': cfg.data_preprocessor})
    model.init_weights()
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    images[:] = images[:1]  # so few patches that they can be learned
    batch = model.data_preprocessor({'inputs': images, 'data_samples': None}, training=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(30):
        loss = model(**batch, mode='loss')['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)

    classifier = load('vrwkv/vrwkv_digits').cfg.model
    classifier.backbone.update(post_norm=True, key_norm=True, init_values=1.0)
    classifier = MODELS.build(classifier)
    fitted = fit({'state_dict': model.state_dict()}, classifier, start=True)
    assert fitted.new == ['head.fc.weight', 'head.fc.bias']
    assert all(name.startswith('neck.') for name in fitted.left_over)


def test_base_pre_training_fits_its_fine_tuning():
    source = load_mae('vrwkv_base_mae_8xb512_in1k')
    target = load_mae('vrwkv_base_mae_finetune_16xb64_in1k')
    with FakeTensorMode():
        target, source = MODELS.build(target.model), MODELS.build(source.model)
        assert fit(source.state_dict(), target, start=True).new == ['head.fc.weight', 'head.fc.bias']
