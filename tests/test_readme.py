"""What the README shows runs, and what it points to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / 'README.md').read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```', README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize('code', blocks('python'))
def test_python_examples_run(code):
    exec(compile(code, 'README.md', 'exec'), {})


def test_there_are_python_examples():
    assert len(blocks('python')) == 2


def test_make_targets_exist():
    targets = re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
    named = set(re.findall(r'(?:^|`)make ([a-z-]+)', README, re.MULTILINE))
    assert named and named <= set(targets), named - set(targets)


def test_links_to_files_resolve():
    links = [link for link in re.findall(r'\]\(([^)]+)\)', README) if '://' not in link]
    missing = [link for link in links if not (ROOT / link).exists()]
    assert len(links) >= 10 and not missing, missing
