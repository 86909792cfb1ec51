"""What docs/security.md and docs/robustness.md say was tried is tested, and a config is a program."""

import re
from pathlib import Path

import pytest
from mmengine.config import Config
from scripts import ROOT

TESTS = '\n'.join(path.read_text() for path in (ROOT / 'tests').rglob('test_*.py'))


@pytest.mark.parametrize(
    ('page', 'heading', 'least'),
    [('security', 'What was tried', 20), ('robustness', 'One line for what is no fault of the code', 7)],
)
def test_every_line_of_the_table_is_a_test(page, heading, least):
    section = (ROOT / f'docs/{page}.md').read_text().partition(f'## {heading}\n')[2].partition('\n## ')[0]
    rows = [line for line in section.splitlines() if line.startswith('| ')][1:]
    assert len(rows) >= least
    for row in rows:
        names = re.findall(r'`(test_\w+)`', row)
        assert names and all(f'def {name}(' in TESTS for name in names), row


def test_a_config_is_a_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('config.py').write_text("open('ran', 'w').close()\nmodel = dict()\n")
    Config.fromfile('config.py')
    assert Path('ran').exists()
