"""`--help` of a benchmark is enough to use it."""

import ast

import pytest
from scripts import ROOT, call

BENCHMARKS = sorted(ROOT.glob('tools/benchmark_*.py'))


@pytest.mark.parametrize('script', BENCHMARKS, ids=lambda path: path.stem)
def test_every_option_is_explained(script):
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    options = [node for node in calls if getattr(node.func, 'attr', '') == 'add_argument']
    assert len(options) >= 3
    for option in options:
        assert any(keyword.arg == 'help' for keyword in option.keywords), ast.unparse(option)


def test_help_says_what_is_measured_and_how(tmp_path):
    said = call('python', ROOT / 'tools/benchmark_ops.py', '--help', cwd=tmp_path).stdout
    assert 'Time the operators' in said and '--device {cpu,cuda}' in said and 'default: all' in said
