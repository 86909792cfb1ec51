"""The benchmark of training iterations runs for both tasks, and says what it measured."""

import sys

import pytest
from dense_configs import CONFIGS, DIGITS, SEGMENTATION

from tools import benchmark_dense
from tools.cli import UserError


@pytest.mark.parametrize('name', DIGITS)
def test_one_row(name, monkeypatch, capsys):
    options = ['--size', '64', '96', '--batch', '2', '--iterations', '1']
    monkeypatch.setattr(sys, 'argv', ['benchmark_dense.py', str(CONFIGS / f'{name}.py'), *options])
    monkeypatch.setattr(benchmark_dense, 'get_device', lambda: 'cpu')
    benchmark_dense.main()
    header, line, row = capsys.readouterr().out.strip().splitlines()[-3:]
    assert header.count('|') == line.count('|') == row.count('|') == 7
    assert row.startswith(f'| {name.split("/")[-1]} | 2 x 64 x 96 | ') and '| CPU, PyTorch' in row


def test_errors(monkeypatch):
    monkeypatch.setattr('tools.cli.get_device', lambda: 'cpu')
    for config, message in ((CONFIGS / f'{SEGMENTATION[0]}.py', 'needs a GPU'), ('no.py', 'config not found: no.py')):
        monkeypatch.setattr(sys, 'argv', ['benchmark_dense.py', str(config)])
        with pytest.raises(UserError, match=message):
            benchmark_dense.main()
