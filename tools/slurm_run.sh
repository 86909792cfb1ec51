#!/usr/bin/env bash
# PARTITION JOB_NAME SCRIPT [arguments]: what slurm_train.sh and slurm_test.sh have in common.
GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-$((GPUS < 8 ? GPUS : 8))}
exec srun --partition="$1" --job-name="$2" --gres="gpu:$GPUS_PER_NODE" \
    --ntasks="$GPUS" --ntasks-per-node="$GPUS_PER_NODE" --cpus-per-task="${CPUS_PER_TASK:-8}" \
    --kill-on-bad-exit=1 ${SRUN_ARGS:-} "${PYTHON:-python}" -u "${@:3}" --launcher slurm
