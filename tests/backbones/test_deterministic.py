"""The same seed gives the same weights, bit for bit: on the CPU always, on a GPU in PyTorch's deterministic mode."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAIN = """
import hashlib, sys, torch
from vision_rwkv.backbones import VRWKV, VRWKV6

device, dtype = sys.argv[1], getattr(torch, sys.argv[2])
torch.use_deterministic_algorithms(True)
for version, heads in (VRWKV, {}), (VRWKV6, {'num_heads': 2}):
    torch.manual_seed(0)
    options = dict(img_size=64, patch_size=8, embed_dims=128, depth=2, drop_path_rate=0.3, post_norm=True)
    model = version(init_values=1, **options, **heads).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(50):
        images = torch.randn(4, 3, 64, 64).to(device)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            y = model(images)[-1]
        (y.float() - images.mean()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = b''.join(p.detach().cpu().numpy().tobytes() for p in model.parameters())
    print(version.__name__, hashlib.sha256(weights).hexdigest(), all(p.isfinite().all() for p in model.parameters()))
"""


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.cuda)])
def test_weights_after_50_steps(device, dtype):
    """In processes of their own, as cuBLAS reads its variable once."""
    env = os.environ | {'PYTHONPATH': str(ROOT), 'CUBLAS_WORKSPACE_CONFIG': ':4096:8', 'OMP_WAIT_POLICY': 'passive'}
    command = [sys.executable, '-c', TRAIN, device, dtype]
    runs = [subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True) for _ in range(2)]
    for run in runs:
        assert run.returncode == 0, run.stderr
    assert runs[0].stdout == runs[1].stdout
    assert runs[0].stdout.count('True') == 2, runs[0].stdout
