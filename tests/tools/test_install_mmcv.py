"""tools/install_mmcv.sh with a stand-in for Python that notes what it is asked for: what is compiled, and when."""

from pathlib import Path

import pytest
from scripts import ROOT, call

TAG = 'torch2.11.0+cu130-py311-cuda'
STANDIN = f"""#!/usr/bin/env bash
here=$(dirname "$0")
case "$*" in
"-c import mmcv"*) [ -e "$here/installed" ] ;;
"-c import sys, torch"*) echo {TAG} ;;
*"pip wheel"*) echo "$*" >>"$here/asked"; while [ "$1" != -w ]; do shift; done; touch "$2/onedl_mmcv-2.3.6-x.whl" ;;
*"pip install"*) echo "$*" >>"$here/asked"; touch "$here/installed" ;;
*) exit 3 ;;
esac
"""


@pytest.fixture
def python(tmp_path) -> Path:
    """The stand-in; what it was asked for is in the file `asked` beside it."""
    path = tmp_path / 'bin/python'
    path.parent.mkdir()
    path.write_text(STANDIN)
    path.chmod(0o755)
    return path


def install(python: Path, kind: str, cache: Path) -> list[str]:
    call(ROOT / 'tools/install_mmcv.sh', python, kind, cwd=cache, XDG_CACHE_HOME=cache)
    return (python.parent / 'asked').read_text().splitlines()


def test_a_wheel_that_is_there_is_installed_without_compiling(python, tmp_path):
    wheel = tmp_path / f'vision-rwkv/mmcv-{TAG}/onedl_mmcv-2.3.6-cp311-cp311-linux_x86_64.whl'
    wheel.parent.mkdir(parents=True)
    wheel.touch()
    asked = install(python, 'with-ops', tmp_path)
    assert not any('pip wheel' in line for line in asked) and asked[0].endswith(str(wheel))


def test_one_that_is_not_is_compiled_once_and_kept(python, tmp_path):
    first, *_ = install(python, 'with-ops', tmp_path)
    assert 'pip wheel' in first and '--no-build-isolation' in first
    assert [path.name for path in (tmp_path / f'vision-rwkv/mmcv-{TAG}').iterdir()] == ['onedl_mmcv-2.3.6-x.whl']
    (python.parent / 'installed').unlink()
    assert sum('pip wheel' in line for line in install(python, 'with-ops', tmp_path)) == 1


def test_without_operators_the_build_is_isolated_and_pips_cache_left_alone(python, tmp_path):
    (asked,) = install(python, 'without-ops', tmp_path)
    assert '--no-build-isolation' not in asked and '--no-cache-dir' in asked
    assert install(python, 'without-ops', tmp_path) == [asked]  # it is there: nothing more to do


def test_another_kind_is_refused(python, tmp_path):
    said = call(ROOT / 'tools/install_mmcv.sh', python, 'ops', cwd=tmp_path, expect=2)
    assert "expected with-ops or without-ops, got 'ops'" in said.stderr
