#!/usr/bin/env bash
# Train under Slurm. From the environment: GPUS (8), GPUS_PER_NODE (8, or GPUS if fewer), CPUS_PER_TASK (8), SRUN_ARGS.
[ $# -ge 3 ] || { echo "usage: $0 PARTITION JOB_NAME CONFIG [arguments of train.py]" >&2; exit 2; }
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "$tools/slurm_run.sh" "$1" "$2" "$tools/train.py" "${@:3}"
