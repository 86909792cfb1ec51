"""The backbones on a GPU: golden outputs, eager, compiled and graph outputs alike, gradients as on the CPU, memory."""

import copy

import golden
import pytest
import torch
from models import GOLDEN, images, make
from test_backbone_golden import SIZES, build

from vision_rwkv.backbones import VRWKV, VRWKV6, blocks

pytestmark = pytest.mark.cuda

OPTIONS = {
    'default': (VRWKV, {}),
    'post_norm': (VRWKV, {'post_norm': True, 'init_values': 0.5}),
    'all_of_large': (VRWKV, {'key_norm': True, 'post_norm': True, 'init_values': 1}),
    'layer_scale': (VRWKV, {'init_values': 0.5}),
    'odd_channels': (VRWKV, {'embed_dims': 45}),
    'no_shift': (VRWKV, {'shift_pixel': 0}),
    'vrwkv6': (VRWKV6, {}),
    'vrwkv6_cls_token': (VRWKV6, {'with_cls_token': True, 'post_norm': True, 'init_values': 1, 'key_norm': True}),
}
# Roundings add up over the layers: measured on the CPU in bfloat16 and float16 autocast alike, 3 and 7 of these.
PRECISION = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def exact_convolutions():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double().cpu() - want.double().cpu()).norm() / want.double().cpu().norm().clamp(min=1e-30)).item()


def gradients(model, x) -> dict[str, torch.Tensor]:
    model.zero_grad()
    x = x.detach().requires_grad_()
    golden.gradient_loss(model(x)[0].cpu()).backward()  # the loss makes its weights on the CPU
    return {'image': x.grad, **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize(('name', 'height', 'width'), SIZES)
def test_golden(name, height, width):
    model = build(name).cuda()
    with torch.no_grad():
        outputs = model(golden.image(height, width).cuda())
    outputs = [y.cpu() for y in outputs]
    assert golden.worst_error(str(GOLDEN / f'{name}.npz'), f'{height}x{width}', outputs) < 1e-4


@pytest.mark.parametrize('name', OPTIONS)
def test_float32_gradients_equal_those_in_float64_on_the_cpu(name):
    version, options = OPTIONS[name]
    model = make(version, **options)
    want = gradients(copy.deepcopy(model).double(), images().double())
    got = gradients(model.cuda(), images().cuda())
    largest = max(x.norm().item() / x.numel() ** 0.5 for x in want.values())
    for key, exact in want.items():
        if exact.norm() > 1e-6 * largest * exact.numel() ** 0.5:
            assert relative(got[key], exact) < 1e-3, key


@pytest.mark.parametrize('dtype', PRECISION)
@pytest.mark.parametrize('name', OPTIONS)
def test_autocast(name, dtype):
    version, options = OPTIONS[name]
    model = make(version, **options).cuda()
    want_output, want = model(images().cuda())[0], gradients(model, images().cuda())
    with torch.autocast('cuda', dtype):
        output, got = model(images().cuda())[0], gradients(model, images().cuda())
    assert output.dtype == torch.float32
    assert relative(output, want_output) < 4 * PRECISION[dtype]
    assert all(x.isfinite().all() for x in got.values())
    assert relative(got['image'], want['image']) < 10 * PRECISION[dtype]


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
@pytest.mark.parametrize('options', [{}, {'post_norm': True, 'init_values': 0.5}, {'drop_path_rate': 0.5}])
@pytest.mark.parametrize('version', [VRWKV, VRWKV6])
def test_a_block_equals_its_modules(version, options, dtype, monkeypatch):
    model = make(version, **options).cuda()
    for part in (model.train(), model.eval()):
        found = []
        for whole in (True, False):
            monkeypatch.setattr(blocks, 'has_block', lambda whole=whole: whole)
            torch.manual_seed(3)  # of drop path
            with torch.autocast('cuda', dtype, enabled=dtype is not None):
                found.append({key: x.clone() for key, x in gradients(part, images().cuda()).items()})
        got, want = found
        if dtype is not None:
            assert relative(got['image'], want['image']) < 10 * PRECISION[dtype]
            continue
        largest = max(x.norm().item() / x.numel() ** 0.5 for x in want.values())
        for key, exact in want.items():
            if exact.norm() > 1e-6 * largest * exact.numel() ** 0.5:
                assert relative(got[key], exact) < 1e-3, key


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
@pytest.mark.parametrize('name', ['default', 'all_of_large', 'vrwkv6'])
def test_eager_compiled_and_graph_outputs_agree(name, dtype):
    torch._dynamo.reset()
    version, options = OPTIONS[name]
    model, x = make(version, **options).cuda().eval(), images(48, 40).cuda()

    def run(function):
        with torch.no_grad(), torch.autocast('cuda', dtype, enabled=dtype is not None):
            return function(x)[0]

    eager = run(model)
    limit = 1e-5 if dtype is None else 2**-6
    assert relative(run(torch.compile(model, fullgraph=True)), eager) < limit
    torch._dynamo.reset()
    graphs = torch.compile(model, fullgraph=True, mode='reduce-overhead')
    for _ in range(3):  # warm-up, capture, replay
        torch.compiler.cudagraph_mark_step_begin()
        assert relative(run(graphs).clone(), eager) < limit
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(model)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(model)
    captured.fill_(torch.nan)
    graph.replay()
    assert relative(captured, eager) < limit


@pytest.mark.parametrize('name', ['default', 'all_of_large', 'vrwkv6'])
def test_compiled_gradients_equal_eager_ones(name):
    torch._dynamo.reset()
    version, options = OPTIONS[name]
    model = make(version, **options).cuda()
    want = {key: x.clone() for key, x in gradients(model, images().cuda()).items()}
    got = gradients(torch.compile(model, fullgraph=True), images().cuda())
    largest = max(x.norm().item() / x.numel() ** 0.5 for x in want.values())
    for (key, exact), x in zip(want.items(), got.values(), strict=True):
        if exact.norm() > 1e-6 * largest * exact.numel() ** 0.5:
            assert relative(x, exact) < 1e-3, key


def test_training_with_a_gradient_scaler():
    model = make(VRWKV, drop_path_rate=0.2, post_norm=True, init_values=1).cuda().train()
    optimizer, scaler = torch.optim.SGD(model.parameters(), 1e-3), torch.amp.GradScaler('cuda', init_scale=512)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast('cuda', torch.float16):
            loss = model(images(batch=4).cuda())[0].float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert loss.isfinite() and scaler.get_scale() == 512


def test_same_bits_again():
    model = make(VRWKV, post_norm=True, init_values=1).cuda()
    with torch.autocast('cuda', torch.bfloat16):
        first = {key: x.clone() for key, x in gradients(model, images().cuda()).items()}
        second = gradients(model, images().cuda())
    layers = [key for key in first if 'mix' in key or 'ln' in key or 'gamma' in key]
    assert layers and all(torch.equal(first[key], second[key]) for key in layers)
