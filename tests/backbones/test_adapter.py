"""The adapter: released tensors and outputs, any image size, batch norm over processes, modes, errors."""

import json
import math
import sys

import golden
import pytest
import torch
from models import GOLDEN, images
from torch import nn

from vision_rwkv.backbones import VRWKV6Adapter, VRWKVAdapter, adapter
from vision_rwkv.backbones.adapter import SyncBatchNorm, to_stages

POST_NORM = {'post_norm': True, 'init_values': 1e-5}
MODELS = {
    'adapter_t': {'embed_dims': 192, 'init_values': 1.0, 'drop_path_rate': 0.1},
    'adapter_s': {'embed_dims': 384, **POST_NORM},
    'adapter_b': {'embed_dims': 768, 'deform_num_heads': 12, 'deform_ratio': 0.5, **POST_NORM},
    'adapter_l': {'embed_dims': 1024, 'deform_num_heads': 16, 'deform_ratio': 0.5, **POST_NORM}
    | {'img_size': 192, 'depth': 24, 'key_norm': True, 'interaction_indexes': [[0, 5], [6, 11], [12, 17], [18, 23]]},
}
BOTH = (VRWKVAdapter, VRWKV6Adapter)


def make(version, **arguments):
    """A small adapter, filled with the golden recipe's weights."""
    dims = {'embed_dims': 48} if version is VRWKVAdapter else {'embed_dims': 64, 'num_heads': 1, 'deform_num_heads': 4}
    model = version(**{'img_size': 64, 'depth': 4, 'conv_inplane': 8, **dims, **arguments})
    golden.fill(model)
    return model


@pytest.mark.parametrize('name', MODELS)
def test_state_dict_has_the_published_names_and_shapes(name):
    published = json.loads((GOLDEN / 'state_dicts.json').read_text())[name]
    with torch.device('meta'):
        model = VRWKVAdapter(**MODELS[name])
    got = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert got == {key: list(shape) for key, shape in dict(published).items()}


@pytest.mark.parametrize(('task', 'token_maps'), [('det', 'final'), ('seg', 'stages')])
def test_output(task, token_maps):
    model = VRWKVAdapter(token_maps=token_maps, **MODELS['adapter_t']).eval()
    golden.fill(model)
    for height, width in ((224, 224), (160, 256)):
        with torch.no_grad():
            outputs = model(golden.image(height, width))
        assert golden.worst_error(str(GOLDEN / f'{task}_t.npz'), f'{height}x{width}', outputs) < 1e-4


@pytest.mark.parametrize('version', BOTH)
@pytest.mark.parametrize('size', [(64, 64), (70, 45), (1, 33)])
def test_any_size_is_padded_and_cut_again(version, size):
    model = make(version).eval()
    height, width = size
    x = images(height, width)
    whole = nn.functional.pad(x, (0, -width % 32, 0, -height % 32))
    with torch.no_grad():
        outputs, wholes = model(x), model(whole)
    for output, of_whole, stride in zip(outputs, wholes, (4, 8, 16, 32), strict=True):
        h, w = math.ceil(height / stride), math.ceil(width / stride)
        assert output.shape == (2, model.embed_dims, h, w)
        torch.testing.assert_close(output, of_whole[:, :, :h, :w], rtol=1e-4, atol=1e-5)


def test_token_maps():
    last, each = make(VRWKVAdapter).eval(), make(VRWKVAdapter, token_maps='stages').eval()
    with torch.no_grad():
        final, stages = last(images(64, 64)), each(images(64, 64))
    assert torch.equal(final[3], stages[3])
    assert not any(torch.equal(a, b) for a, b in zip(final[:3], stages[:3], strict=True))


def test_initial_values():
    torch.manual_seed(0)
    model = VRWKVAdapter(embed_dims=192)
    plain = nn.Conv2d(3, 192, 16, 16)
    bound = 1 / math.sqrt(3 * 16 * 16)  # PyTorch's own for this convolution
    assert model.patch_embed.projection.weight.abs().max() <= bound and plain.weight.abs().max() <= bound
    assert model.level_embed.std().item() == pytest.approx(1, abs=0.1)
    deviations = {
        'spm.stem.3': math.sqrt(2 / (9 * 64)),
        'spm.conv3.0': math.sqrt(2 / (9 * 256)),
        'spm.fc2': math.sqrt(2 / 192),
        'up': math.sqrt(2 / (4 * 192)),
        'interactions.0.extractor.ffn.dwconv.dwconv': math.sqrt(2 / 9),
        'interactions.2.extractor.ffn.fc1': 0.02,
        'interactions.3.extra_extractors.1.ffn.fc2': 0.02,
        'interactions.0.injector.attn.value_proj': math.sqrt(2 / (192 + 192)),
        'interactions.0.injector.attn.output_proj': math.sqrt(2 / (192 + 192)),
    }
    for name, deviation in deviations.items():
        layer = model.get_submodule(name)
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.1), name
        assert layer.bias is None or not layer.bias.any(), name
    for interaction in model.interactions:
        assert not interaction.injector.gamma.any()
        attention = interaction.extractor.attn
        assert not attention.sampling_offsets.weight.any() and not attention.attention_weights.weight.any()
        ring = attention.sampling_offsets.bias.view(6, 4, 2)  # head, point, (x, y)
        assert ring.abs().amax(-1).allclose(torch.tensor([1.0, 2, 3, 4]).expand(6, 4))
        assert interaction.extractor.attn.dropout.p == 0


def test_injection_starts_at_nothing_and_drop_path_is_the_models():
    torch.manual_seed(0)
    model = VRWKVAdapter(embed_dims=48, img_size=32, depth=4, conv_inplane=8, drop_path_rate=0.3).eval()
    assert [i.extractor.drop_path.drop_prob for i in model.interactions] == [0.3] * 4
    x = images(32, 32)
    seen = []
    model.layers[-1].register_forward_hook(lambda _, inputs, output: seen.append(output))
    with torch.no_grad():
        model(x)
        tokens, hw = model.embed(x)
        for layer in model.layers:
            tokens = layer(tokens, hw)
    assert torch.equal(seen[0], tokens)


@pytest.mark.parametrize('version', BOTH)
@pytest.mark.parametrize('token_maps', ['final', 'stages'])
def test_every_parameter_learns(version, token_maps):
    model = make(version, token_maps=token_maps, drop_path_rate=0.2).train()
    sum(golden.gradient_loss(output) for output in model(images(64, 96))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert model.interactions[0].injector.attn.sampling_offsets.weight.grad.any()


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('version', BOTH)
def test_frozen_stages_are_layers_of_the_backbone(version, with_cp):
    model = make(version, frozen_stages=2, with_cp=with_cp, drop_path_rate=0.5).train()
    nn.init.ones_(model.interactions[0].injector.gamma)
    sum(y.square().mean() for y in model(images(64, 64))).backward()
    frozen = ('patch_embed.', 'pos_embed', 'layers.0.', 'layers.1.')
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == (not name.startswith(frozen)), name
    assert [layer.training for layer in model.layers] == [False, False, True, True]
    assert model.spm.training and model.interactions[0].training
    with pytest.raises(ValueError, match='frozen_stages must be at most the depth, 4, got 5'):
        make(version, frozen_stages=5)


def outputs_and_gradients(model):
    torch.manual_seed(3)
    x = images(64, 64).requires_grad_()
    outputs = model(x)
    sum(map(golden.gradient_loss, outputs)).backward()
    return [*(y.detach() for y in outputs), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize('version', BOTH)
def test_checkpointing_changes_no_value(version):
    options = {'drop_path_rate': 0.5, 'init_values': 1}
    plain, saving = make(version, **options).train(), make(version, with_cp=True, **options).train()
    calls = []
    for interaction in saving.interactions:
        interaction.injector.attn.register_forward_hook(lambda *_: calls.append('injector'))
        interaction.extractor.attn.register_forward_hook(lambda *_: calls.append('extractor'))
    assert all(map(torch.equal, outputs_and_gradients(saving), outputs_and_gradients(plain)))
    assert sorted(calls) == ['extractor'] * 8 + ['injector'] * 8  # each once more in the backward pass
    for (name, a), b in zip(saving.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b), name  # batch norm has counted each image once


@pytest.mark.parametrize('version', BOTH)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_is_finite_and_close(version, dtype):
    model = make(version).eval()
    want = outputs_and_gradients(model)
    model.zero_grad()
    seen = set()
    for name, module in model.named_modules():
        if name.endswith('attn.value_proj'):
            module.register_forward_hook(lambda _, inputs, output: seen.add((inputs[0].dtype, output.dtype)))
    with torch.autocast('cpu', dtype):
        got = outputs_and_gradients(model)
    assert seen == {(torch.float32, torch.float32)}  # mmcv's kernel has no bfloat16
    assert all(x.isfinite().all() for x in got)
    precision = 2**-7 if dtype == torch.bfloat16 else 2**-10
    for a, b in zip(got[:4], want[:4], strict=True):
        assert (a - b).norm() < 4 * precision * b.norm()


def test_batch_norm_is_synchronised_on_gpus_and_plain_on_a_cpu(monkeypatch):
    model = make(VRWKVAdapter)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 10 and all(type(norm) is SyncBatchNorm for norm in norms)
    norm, plain = SyncBatchNorm(48).train(), nn.BatchNorm2d(48).train()
    assert list(norm.state_dict()) == list(plain.state_dict())
    x = images(8, 8, channels=48)
    assert torch.equal(norm(x), plain(x))
    # What a GPU would run: PyTorch's synchronised one, which needs no others in a single process.
    assert torch.equal(nn.SyncBatchNorm.forward(norm, x), plain(x))
    for (name, a), b in zip(norm.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b), name

    calls = []
    monkeypatch.setattr(nn.SyncBatchNorm, 'forward', lambda self, x: calls.append(x))
    norm(x)
    assert not calls
    norm(FakeCuda(x))
    assert len(calls) == 1


class FakeCuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def train_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(make(VRWKVAdapter).train(), broadcast_buffers=False)
    sum(y.square().mean() for y in model(images(64, 64, batch=1) + rank)).backward()
    means = [torch.empty(48) for _ in range(2)]
    torch.distributed.all_gather(means, model.module.norm1.running_mean)
    gradients = [torch.empty(48) for _ in range(2)]
    torch.distributed.all_gather(gradients, model.module.norm1.weight.grad)
    torch.distributed.destroy_process_group()
    assert not torch.equal(*means) and torch.equal(*gradients)


def test_trains_in_processes_on_a_cpu(tmp_path):
    torch.multiprocessing.spawn(train_process, (str(tmp_path),), nprocs=2)


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        ({'patch_size': 8}, ValueError, 'patch_size must be 16 with the adapter, got 8'),
        ({'token_maps': 'all'}, ValueError, "token_maps must be 'final' or 'stages', got 'all'"),
        ({'n_points': 0}, ValueError, 'n_points must be at least 1, got 0'),
        ({'conv_inplane': 8.0}, TypeError, 'conv_inplane must be an int, got 8.0'),
        ({'deform_num_heads': 7}, ValueError, 'embed_dims=48 .*divisible by deform_num_heads=7'),
        ({'deform_ratio': 0}, ValueError, 'deform_ratio must be in'),
        ({'cffn_ratio': 0}, ValueError, 'cffn_ratio must be in'),
        ({'out_indices': [0]}, TypeError, "no argument 'out_indices'"),
        ({'final_norm': True}, TypeError, "no argument 'final_norm'"),
        ({'depth': 6}, ValueError, 'interaction_indexes must be four pairs .* layers 0 to 5 .* got None'),
        ({'n_point': 4}, TypeError, 'n_point'),
    ],
)
def test_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        make(VRWKVAdapter, **arguments)


def test_no_class_token():
    with pytest.raises(TypeError, match="no argument 'with_cls_token'"):
        make(VRWKV6Adapter, with_cls_token=True)


def test_interaction_indexes():
    assert to_stages(None, 12) == [(0, 2), (3, 5), (6, 8), (9, 11)]
    assert to_stages([[0, 0], [1, 1], [2, 2], [3, 5]], 6) == [(0, 0), (1, 1), (2, 2), (3, 5)]
    for wrong in ([[0, 2], [3, 5]], [[0, 2], [2, 5], [6, 8], [9, 11]], [[0, 2], [3, 5], [6, 8], [9, 10]], 3, [1, 2]):
        with pytest.raises(ValueError, match=r'four pairs \[first layer, last layer\] that cover layers 0 to 11'):
            to_stages(wrong, 12)
    with pytest.raises(ValueError, match='four pairs'):
        to_stages([[0, 11], [12, 11], [12, 11], [12, 11]], 12)


@pytest.mark.parametrize('x', [torch.zeros(1, 3, 8), torch.zeros(1, 4, 8, 8)])
def test_images(x):
    with pytest.raises(ValueError, match=r'must have shape \(B, 3, H, W\), got'):
        make(VRWKVAdapter)(x)


def test_without_mmcv(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmcv.ops', None)
    with pytest.raises(ImportError, match=r'deformable attention from mmcv\.ops.*install_mmcv\.sh PYTHON with-ops'):
        make(VRWKVAdapter)


def test_attention_takes_any_batch():
    model = make(VRWKVAdapter).eval()
    for batch, step in ((1, 1), (6, 2), (3, 1)):
        with torch.no_grad():
            model(images(32, 32, batch=batch))
        assert model.interactions[0].injector.attn.im2col_step == step


@pytest.mark.cuda
@pytest.mark.parametrize('version', BOTH)
@pytest.mark.parametrize('dtype', [None, torch.float16, torch.bfloat16])
def test_cuda_equals_cpu(version, dtype):
    model = make(version, token_maps='stages').eval()
    x = images(70, 100)
    want = model(x)
    model.cuda()
    with torch.autocast('cuda', dtype, enabled=dtype is not None):
        got = model(x.cuda())
    sum(y.float().square().mean() for y in got).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    tolerance = {None: 1e-2, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]  # TensorFloat-32 in convolutions
    for a, b in zip(got, want, strict=True):
        assert (a.cpu() - b).norm() < tolerance * b.norm()


def test_norm_epsilon():
    norms = [module for module in make(VRWKVAdapter).interactions.modules() if isinstance(module, nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {adapter.NORM_EPS} == {1e-6}
