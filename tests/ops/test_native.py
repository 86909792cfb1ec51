"""Which implementation runs, what runs without native code, and every vector width."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fused_cases import SIZES, cases
from op_cases import OPERATORS, bi_wkv_inputs, wkv6_inputs

from vision_rwkv.ops import implementation

ROOT = Path(__file__).resolve().parents[2]
CHECK = """
import sys, torch
sys.path.insert(0, 'tests/ops')
from op_cases import assert_equals_definition, bi_wkv_inputs, wkv6_inputs, OPERATORS
for dtype in (torch.float32, torch.float64):
    for c in (3, 35, 64):
        assert_equals_definition('bi_wkv', OPERATORS['bi_wkv'], bi_wkv_inputs(2, 131, c), dtype, 'cpu')
    for n in (5, 64):
        assert_equals_definition('wkv6', OPERATORS['wkv6'], wkv6_inputs(1, 67, 3, n), dtype, 'cpu')
"""

GRADIENTS = """
import sys, torch
sys.path.insert(0, 'tests/ops')
from fused_cases import SIZES, cases, check
from op_cases import assert_equals_definition, bi_wkv_inputs, wkv6_inputs, OPERATORS
assert_equals_definition('bi_wkv', OPERATORS['bi_wkv'], bi_wkv_inputs(2, 9, 3), torch.float64, 'cpu')
assert_equals_definition('wkv6', OPERATORS['wkv6'], wkv6_inputs(1, 9, 2, 4), torch.float64, 'cpu')
for name, case in cases(SIZES['heads']).items():
    check(case, 'float64', 'cpu')
    if name == 'residual_plain':
        continue
    leaves = [x.detach().requires_grad_() for x in case.inputs.values()]
    total = sum(y.sum() for y in case.op(*leaves))
    (grad,) = torch.autograd.grad(total, leaves[-1], create_graph=True)
    try:
        grad.sum().backward()
    except RuntimeError as error:
        assert 'has no second derivative' in str(error), error
    else:
        raise SystemExit(f'{name} has a second derivative')
"""


def python(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {'PYTHONPATH': str(cwd)} | environment
    return subprocess.run([sys.executable, '-c', code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(shutil.which('c++') is None, reason='no C++ compiler to have built native code with')
def test_native_code_runs_where_there_is_a_compiler():
    assert implementation('cpu') == 'native'


def test_devices_without_native_code_use_pytorch():
    assert implementation('meta') == 'pytorch'
    if not torch.cuda.is_available() and not torch.version.cuda:
        assert implementation('cuda') == 'pytorch'


@pytest.mark.parametrize('capability', ['default', 'avx2', 'avx512'])
def test_every_vector_width(capability):
    """PyTorch's own switch chooses the width. PyTorch does not check it, and crashes where the processor lacks it."""
    widths = ['DEFAULT', 'AVX2', 'AVX512']
    here = torch.backends.cpu.get_cpu_capability()
    if capability != 'default' and (here not in widths or widths.index(capability.upper()) > widths.index(here)):
        pytest.skip(f'this processor has {here}')
    done = python(CHECK, ATEN_CPU_CAPABILITY=capability)
    assert done.returncode == 0, done.stderr


def test_without_native_code_the_pytorch_implementation_serves_and_says_so_once():
    code = """
import warnings, torch
from vision_rwkv.ops import bi_wkv, implementation, wkv6
assert implementation('cpu') == 'pytorch', implementation('cpu')
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    x = torch.randn(1, 9, 4)
    for _ in range(2):
        assert bi_wkv(x[0, 0], x[0, 1], x, x).isfinite().all()
said = [str(w.message) for w in caught if 'vision_rwkv' in str(w.message)]
assert len(said) == 1, said
assert 'VISION_RWKV_NATIVE=0' in said[0] and 'pip install' in said[0], said
"""
    done = python(code, VISION_RWKV_NATIVE='0')
    assert done.returncode == 0, done.stderr


def test_gradients_without_native_code():
    done = python(GRADIENTS, VISION_RWKV_NATIVE='0')
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which('c++') is None, reason='no C++ compiler to have built native code with')
def test_native_code_registers_the_gradients():
    """Python's way costs 100 microseconds a call."""
    found = cases(SIZES['heads'])
    calls = {name: (found[name].op, found[name].inputs) for name in found}
    calls['bi_wkv'] = OPERATORS['bi_wkv'], bi_wkv_inputs(1, 3, 2)
    calls['wkv6'] = OPERATORS['wkv6'], wkv6_inputs(1, 3, 1, 2)
    for name, (op, inputs) in calls.items():
        results = op(*(x.detach().requires_grad_() for x in inputs.values()))
        first = results if isinstance(results, torch.Tensor) else results[0]
        assert 'vision_rwkv::' in first.grad_fn.name(), name


@pytest.fixture
def sources(tmp_path) -> Path:
    """What a build needs, without what this checkout has built."""
    for name in ('kernels', 'vision_rwkv'):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns('*.so', '__pycache__'))
    for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def build(sources: Path, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | environment
    command = [sys.executable, 'setup.py', 'build_ext', '--inplace']
    return subprocess.run(command, cwd=sources, env=env, capture_output=True, text=True, timeout=300)


def test_installing_without_a_compiler_works_with_a_warning(sources):
    done = build(sources, CC='no-such-compiler', CXX='no-such-compiler', VISION_RWKV_CUDA='0')
    assert done.returncode == 0, done.stderr
    assert 'no native operators, the PyTorch implementation will serve' in done.stderr
    assert not list(sources.glob('vision_rwkv/_native*'))
    done = python("from vision_rwkv.ops import implementation; print(implementation('cpu'))", cwd=sources)
    assert done.stdout.strip() == 'pytorch', done.stderr


def test_asking_for_cuda_code_that_cannot_be_built_is_an_error(sources):
    done = build(sources, CXX='no-such-compiler', CC='no-such-compiler', VISION_RWKV_CUDA='1')
    assert done.returncode != 0


def test_a_library_of_another_pytorch_is_not_used(sources):
    (sources / 'vision_rwkv/_native.so').write_bytes(b'not a library')
    code = """
import warnings, torch
from vision_rwkv.ops import bi_wkv, implementation
assert implementation('cpu') == 'pytorch'
warnings.simplefilter('error')
try:
    bi_wkv(torch.zeros(1), torch.zeros(1), torch.zeros(1, 2, 1), torch.zeros(1, 2, 1))
except UserWarning as warning:
    assert '_native.so does not load' in str(warning), warning
else:
    raise SystemExit('no warning')
"""
    done = python(code, cwd=sources)
    assert done.returncode == 0, done.stderr
