#!/usr/bin/env bash
# Memory errors and undefined behaviour of the operators' native code. The library in the work tree is left alone.
#
# sanitize.sh PYTHON cpu    what of tests/ops runs native code, on a library built with GCC's sanitizers, in build/sanitize
# sanitize.sh PYTHON cuda   random odd shapes under each tool of NVIDIA's compute-sanitizer, on the installed library
set -euo pipefail
[ $# -eq 2 ] || { sed -n 4,5p "$0" >&2; exit 2; }
python=$(realpath -s "$1")
cd "$(dirname "$0")/.."
if [ "$2" = cuda ]; then
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # or a read past one tensor ends in another
    logs=build/sanitize/cuda
    mkdir -p $logs
    check() { # tool, options of pytest; only PyTorch's kernels say for initcheck what has been written
        local kernels=(--kernel-name 'regex=[0-9](bi_wkv|wkv6|q_shift|pointwise|dynamic_mix|rows)')
        [ "$1" != initcheck ] || kernels=()
        compute-sanitizer --tool "$1" "${kernels[@]}" --error-exitcode 9 "$python" -m pytest -q -p no:cacheprovider -m cuda "${@:2}"
    }
    declare -A running
    for tool in memcheck racecheck initcheck synccheck; do
        check $tool tests/ops/test_attack.py -k kernels_alone --attack 300 >$logs/$tool 2>&1 &
        running[$tool]=$!
        check $tool tests/ops/test_attack_fused.py --attack 200 >$logs/$tool-fused 2>&1 &
        running[$tool-fused]=$!
    done
    failed=0
    for name in "${!running[@]}"; do
        wait "${running[$name]}" || { failed=1; cat "$logs/$name"; }
        echo "$name: $(tail -n 1 "$logs/$name")"
    done
    exit $failed
fi
flags='-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer'
mkdir -p build/sanitize
cp -ru kernels vision_rwkv setup.py pyproject.toml README.md LICENSE tests build/sanitize
cd build/sanitize
sanitized() { grep -qs __asan_init vision_rwkv/_native*.so; }  # and not the work tree's, which was copied with the rest
if ! sanitized || [ ! -e .built ] || [ -n "$(find kernels setup.py -newer .built)" ]; then
    rm -f vision_rwkv/_native*.so
    CFLAGS="$flags" LDFLAGS="$flags" VISION_RWKV_CUDA=0 "$python" setup.py -q build_ext --inplace
    sanitized
    touch .built
fi
# Python is built without them, so they come first; C++ exceptions need their library in sight by then.
preload=$(for name in libasan.so libubsan.so libstdc++.so; do realpath "$(c++ -print-file-name=$name)"; done)
# All that runs native code, the attacks with a few cases; not what runs the implementation in PyTorch or a compiler, and
# not PyTorch's own checks, which call the same kernels on a few numbers over and over. Python's memory is not ours to free.
without='pytorch or compiles or install or cuda_code or opcheck or gradcheck'
LD_PRELOAD=${preload//$'\n'/:} ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$PWD OMP_WAIT_POLICY=passive \
    "$python" -m pytest -q -p no:cacheprovider -n 2 tests/ops -m 'not slow and not cuda' -k "not ($without)" --attack 200
