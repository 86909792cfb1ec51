"""The model of memory and time against what autograd keeps, and against the points that were measured."""

import json
import sys

import pytest
import torch
from scripts import ROOT, call

from tools import scaling


def kept_units(name: str) -> float:
    """Bytes that one more layer keeps for the backward pass, in units, on a CPU under bfloat16 autocast."""
    side, batch, kept = 64, 3, []
    for depth in (2, 3):
        model = scaling.MODELS[name](side)
        del model.layers[depth:]
        model.out_indices = (depth - 1,)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        held, sizes = [], {}

        def keep(x, held=held, sizes=sizes, parameters=parameters):
            held.append(x)  # so that no storage is used twice
            # Values of tokens: weights' copies in bfloat16 are not.
            if x.untyped_storage().data_ptr() not in parameters and {16, 48} & set(x.shape):
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast('cpu', torch.bfloat16):
            model.train()(torch.randn(batch, 3, side, side))
        kept.append(sum(sizes.values()))
    return (kept[1] - kept[0]) / (2 * batch * 16 * model.embed_dims)


@pytest.mark.parametrize('name', ['vrwkv_t', 'vrwkv_s', 'vrwkv6_t'])
def test_a_layer_keeps_what_the_model_says(name):
    want = scaling.layer_of(scaling.made(scaling.Point(name, 64, 1, 'train'))).kept
    assert kept_units(name) == pytest.approx(want, rel=0.1)


def test_measured_points_are_within_15_percent():
    said = call(sys.executable, 'tools/scaling.py', '--measured', 'docs/scaling.json', cwd=ROOT).stdout
    points = json.loads((ROOT / 'docs/scaling.json').read_text())
    assert len(said.splitlines()) == 2 + len(points)
    page = (ROOT / 'docs/scaling.md').read_text()
    assert all(line in page for line in said.splitlines())


def test_the_table_has_every_model():
    said = call(sys.executable, 'tools/scaling.py', cwd=ROOT).stdout
    assert all(said.count(f'| {name} |') == 5 for name in scaling.MODELS)


def test_a_point_that_is_off_and_wrong_files_are_told(tmp_path):
    path = tmp_path / 'points.json'
    point = {'model': 'vrwkv_t', 'side': 224, 'batch': 128, 'kind': 'infer', 'ms': 1.0}
    for content, message in (
        (json.dumps([point]), 'more than 15 percent off'),
        (json.dumps([point | {'model': 'vit'}]), 'expected a model of'),
        ('no JSON', 'error'),
    ):
        path.write_text(content)
        assert message in call(sys.executable, 'tools/scaling.py', '--measured', path, cwd=ROOT, expect=1).stderr
    missing = call(sys.executable, 'tools/scaling.py', '--measured', tmp_path / 'none', cwd=ROOT, expect=1)
    assert 'does not exist' in missing.stderr
