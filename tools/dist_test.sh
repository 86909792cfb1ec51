#!/usr/bin/env bash
# Test on the GPUs of this machine, or with as many processes where there is none. Several machines: see launch.py.
[ $# -ge 3 ] || { echo "usage: $0 CONFIG CHECKPOINT GPUS [arguments of test.py]" >&2; exit 2; }
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python}" "$tools/launch.py" "$3" "$tools/test.py" "$1" "$2" "${@:4}"
