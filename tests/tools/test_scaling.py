"""The model of memory and time against a count of what lives, and against the points that were measured."""

import json
import sys

import live_tensors
import pytest
from scripts import ROOT

from tools import scaling


def run(monkeypatch, *arguments: object) -> None:
    """scaling.py as from the command line, in this process."""
    monkeypatch.setattr(sys, 'argv', ['scaling.py', *map(str, arguments)])
    scaling.main()


@pytest.mark.parametrize(('name', 'side', 'batch'), [
    ('vrwkv_t', 224, 128), ('vrwkv_b', 224, 64), ('vrwkv_l', 384, 8), ('vrwkv6_b', 512, 16)
])  # fmt: skip
def test_what_lives_in_training_is_what_the_model_says(name, side, batch):
    counted = live_tensors.peak(lambda: scaling.MODELS[name](side), batch, side, 'train')
    said = scaling.memory(scaling.Point(name, side, batch, 'train'), workspaces=0)
    assert said == pytest.approx(counted, rel=0.01)


def test_measured_points_are_within_15_percent(monkeypatch, capsys):
    """And the page has what is printed."""
    run(monkeypatch, '--measured', ROOT / 'docs/scaling.json')
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 + len(json.loads((ROOT / 'docs/scaling.json').read_text()))
    page = (ROOT / 'docs/scaling.md').read_text()
    assert not [line for line in said if line not in page]


def test_the_table_has_every_model(monkeypatch, capsys):
    run(monkeypatch)
    said = capsys.readouterr().out
    assert all(said.count(f'| {name} |') == 5 for name in scaling.MODELS)


POINT = {'model': 'vrwkv_t', 'side': 224, 'batch': 128, 'kind': 'infer', 'ms': 1.0, 'of': 'x'}


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (json.dumps([POINT]), 'more than 15 percent off'),
        (json.dumps([POINT | {'model': 'vit'}]), 'expected a model of'),
        ('no JSON', 'error'),
        (None, 'does not exist'),
    ],
)
def test_a_point_that_is_off_and_wrong_files_are_told(content, message, monkeypatch, tmp_path):
    path = tmp_path / 'points.json'
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, '--measured', path)
