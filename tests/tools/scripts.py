"""Scripts run as a user would."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """This process's environment with this Python first, and nothing of a launcher's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith('SLURM_')}
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'NNODES', 'PYTHONPATH'):
        kept.pop(name, None)
    kept['PATH'] = f'{Path(sys.executable).parent}{os.pathsep}{kept["PATH"]}'
    return kept


def call(*command, cwd, expect=0, **extra_environment) -> SimpleNamespace:
    """Run a command to its end; fail, with all it said, unless its exit status is ``expect``."""
    env = environment() | {name: str(value) for name, value in extra_environment.items()}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == expect, f'{command}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}'
    return SimpleNamespace(stdout=done.stdout, stderr=done.stderr, output=done.stdout + done.stderr)


def errors_in(stderr: str) -> list[str]:
    """The lines of ``stderr``, but for what libraries always say there."""
    noise = ('Could not import OneDL', 'Warning', 'warnings.warn', 'redispatch')
    return [line for line in stderr.splitlines() if line.strip() and not any(word in line for word in noise)]
