#!/usr/bin/env bash
# Train on the GPUs of this machine, or with as many processes where there is none. Several machines: see launch.py.
[ $# -ge 2 ] || { echo "usage: $0 CONFIG GPUS [arguments of train.py]" >&2; exit 2; }
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python}" "$tools/launch.py" "$2" "$tools/train.py" "$1" "${@:3}"
