"""The sdist holds all that a wheel is built from, and the wheel works by itself in an empty environment."""

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    f'onedl-{name}': module
    for name, module in (
        ('mmengine', 'mmengine'),
        ('mmcv', 'mmcv'),
        ('mmpretrain', 'mmpretrain'),
        ('mmdetection', 'mmdet'),
        ('mmsegmentation', 'mmseg'),
    )
}
PARTS = ('kernels', 'vision_rwkv', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE')

PROGRAM = """
import sys
import torch
import vision_rwkv
from vision_rwkv.backbones import VRWKV, VRWKV6
from vision_rwkv.ops import bi_wkv, implementation, reference

assert vision_rwkv.__file__.startswith(sys.prefix), vision_rwkv.__file__
assert implementation('cpu') == 'native'
w, u, k, v = torch.rand(8), torch.zeros(8), torch.randn(2, 50, 8), torch.randn(2, 50, 8)
assert (bi_wkv(w, u, k, v) - reference.bi_wkv(w, u, k, v)).abs().max() < 1e-5
images = torch.randn(1, 3, 40, 50)
assert VRWKV(embed_dims=16, depth=1)(images)[0].shape == (1, 16, 3, 4)
assert VRWKV6(embed_dims=64, num_heads=1, depth=1)(images)[0].shape == (1, 64, 3, 4)
print('works')
"""


def run(*command, cwd, **environment) -> str:
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'} | environment
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f'{done.stdout}\n{done.stderr}'
    return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    """A wheel without CUDA code, built from an unpacked sdist of what the repository tracks."""
    source, built = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('built')
    ignored = shutil.ignore_patterns('*.so', '__pycache__')
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=ignored)
        else:
            shutil.copy(ROOT / part, source)
    run(sys.executable, 'setup.py', '-q', 'sdist', '-d', built, cwd=source, VISION_RWKV_CUDA='0')
    (sdist,) = built.glob('vision_rwkv-*.tar.gz')
    command = ('-m', 'pip', 'wheel', '-q', '--no-build-isolation', '--no-deps', '-w', built, sdist)
    run(sys.executable, *command, cwd=built, VISION_RWKV_CUDA='0')
    (made,) = built.glob('vision_rwkv-*.whl')
    return made


@pytest.mark.slow
def test_wheel_in_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path / 'venv', with_pip=True)
    python = tmp_path / 'venv/bin/python'
    run(python, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', wheel, cwd=tmp_path)
    # PyTorch and timm are those of this environment; a folder that a .pth file names is searched after the venv's own.
    (packages,) = (tmp_path / 'venv/lib').glob('python*/site-packages')
    (packages / 'torch.pth').write_text(f'{Path(torch.__file__).parents[1]}\n')
    (tmp_path / 'elsewhere').mkdir()
    assert run(python, '-c', PROGRAM, cwd=tmp_path / 'elsewhere', VISION_RWKV_NATIVE='1').strip() == 'works'


@pytest.mark.slow
def test_the_wheel_serves_every_python_and_names_its_extras(wheel, tmp_path):
    assert '-cp310-abi3-' in wheel.name
    shutil.unpack_archive(wheel, tmp_path, 'zip')
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob('*') if path.is_file()}
    assert 'vision_rwkv/_native.so' in files
    assert not [name for name in files if not name.startswith(('vision_rwkv/', 'vision_rwkv-'))]
    (metadata,) = tmp_path.glob('*.dist-info/METADATA')
    text = metadata.read_text()
    for line in ('Requires-Dist: torch>=2.11', 'Provides-Extra: mm', 'Provides-Extra: export', 'License-File: LICENSE'):
        assert line in text
    pinned = (ROOT / 'requirements/classification.txt').read_text() + (ROOT / 'requirements/all.txt').read_text()
    for package in ('onedl-mmengine', 'onedl-mmpretrain', 'onedl-mmdetection', 'onedl-mmsegmentation'):
        (line,) = (line for line in pinned.splitlines() if line.startswith(package))
        assert f'Requires-Dist: {line}; extra == "mm"' in text
    for line in text.splitlines():
        if line.startswith('Requires-Dist: '):
            wanted = Requirement(line.removeprefix('Requires-Dist: '))
            if importlib.util.find_spec(MODULES.get(wanted.name, wanted.name)):  # what the tests run with is allowed
                assert wanted.specifier.contains(version(wanted.name)), line
