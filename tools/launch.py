"""Start processes of a script on this machine with torchrun: launch.py GPUS SCRIPT [arguments].

GPUS counts GPUs, or processes on a machine without one. Several machines: NNODES, NODE_RANK, MASTER_ADDR and PORT in
the environment of each.
"""

import logging
import os
import signal
import sys

try:
    import torch
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
except ImportError as missing:
    sys.exit(
        f'error: {sys.executable}: {missing}; activate the virtual environment (. .venv/bin/activate) or set PYTHON'
    )


def main() -> None:
    """Run the processes; the exit status is that of the first to fail, whose own words stay the last."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    count, script, *args = sys.argv[1:]
    if not count.isdigit() or int(count) < 1:
        sys.exit(f'error: expected the number of GPUs (of processes on a machine without one), got {count!r}')
    if torch.cuda.is_available() and int(count) > torch.cuda.device_count():
        sys.exit(f'error: {count} GPUs asked for, {torch.cuda.device_count()} here')

    threads = str(max(1, len(os.sched_getaffinity(0)) // int(count)))
    os.environ.setdefault('OMP_NUM_THREADS', threads)
    os.environ.setdefault('MKL_NUM_THREADS', os.environ['OMP_NUM_THREADS'])
    logging.disable(logging.ERROR)  # torchrun's report of a failed process is longer than the process's own
    try:
        # After '--', options of the script are not taken for short forms of torchrun's.
        run.main([*_where(), f'--nproc-per-node={count}', '--', script, *args, '--launcher', 'pytorch'])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            why = ', as by a machine that runs out of memory' if -failure.exitcode == signal.SIGKILL else ''
            print(f'process {rank} was ended by signal {-failure.exitcode}{why}', file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)


def _where() -> list[str]:
    if int(os.environ.get('NNODES', 1)) == 1:
        return ['--standalone']  # takes a free port
    names = {'nnodes': 'NNODES', 'node-rank': 'NODE_RANK', 'master-addr': 'MASTER_ADDR', 'master-port': 'PORT'}
    missing = [name for name in names.values() if name not in os.environ and name != 'PORT']
    if missing:
        sys.exit(f'error: NNODES is {os.environ["NNODES"]}, so {", ".join(missing)} must be set too')
    return [f'--{option}={os.environ.get(name, "29500")}' for option, name in names.items()]


if __name__ == '__main__':
    main()
