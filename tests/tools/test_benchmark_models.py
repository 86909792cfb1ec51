"""The benchmark of the models: a CPU row, the verdicts, and what is refused."""

import sys

import pytest
import torch
from scripts import ROOT, call

from tools import benchmark_models


def test_prints_a_row():
    command = (sys.executable, 'tools/benchmark_models.py', '--rows', 'cpu-224', '--seconds', 0.1)
    out = call(*command, cwd=ROOT, PYTHONPATH=ROOT).stdout
    (line,) = [line for line in out.splitlines() if line.startswith('| cpu-224 |')]
    cells = [cell.strip() for cell in line.strip('|').split('|')]
    ours, rival, ratio = (float(cell.split()[-1]) for cell in cells[4:7])
    assert cells[4].startswith('vrwkv_t') and cells[5].startswith('deit_t')
    assert ratio == pytest.approx(rival / ours, abs=0.02)
    assert cells[7] == benchmark_models.verdict(ratio, 1.0) or ratio == 1.0  # rounded, from either side


def test_verdict():
    assert benchmark_models.verdict(2.0, 2.0) == '2.00 met'
    assert benchmark_models.verdict(1.9, 2.0) == '2.00 NOT met'
    assert benchmark_models.verdict(1.9, None) == '-'


@pytest.mark.parametrize('mode', ['infer', 'train'])
def test_a_step_of_each_model(mode):
    for name in (*benchmark_models.OURS, *benchmark_models.DEIT):
        if name.endswith('_t'):
            y = benchmark_models.step(name, 32, 1, mode, 'eager', 'cpu')()
            assert mode == 'train' or y.isfinite().all()


def test_refuses_rows_of_the_other_device(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['benchmark_models.py', '--rows', 't-224'])
    with pytest.raises(SystemExit, match='2'):
        benchmark_models.main()
    assert 'not rows of --device cpu: t-224' in capsys.readouterr().err
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, 'argv', ['benchmark_models.py', '--device', 'cuda'])
        with pytest.raises(SystemExit, match='needs a CUDA GPU'):
            benchmark_models.main()
