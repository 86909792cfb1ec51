#!/usr/bin/env bash
# Installs mmcv into the environment of PYTHON: install_mmcv.sh PYTHON [with-ops|without-ops]
#
# The package comes as source. With its operators (detection, segmentation) it takes minutes to compile, so that wheel
# is kept, one for each PyTorch, Python and kind of machine. pip's own cache would mix up the two kinds: both have one
# name and version.
set -euo pipefail

python=${1:?usage: install_mmcv.sh PYTHON [with-ops|without-ops]}
kind=${2:-with-ops}
package=onedl-mmcv==2.3.6

has_ops() { "$python" -c 'import mmcv.ops' 2>/dev/null; }

if "$python" -c 'import mmcv' 2>/dev/null && { [ "$kind" = without-ops ] || has_ops; }; then
    exit 0
fi
case $kind in
without-ops)
    "$python" -m pip install -q --no-cache-dir "$package" # an isolated build sees no PyTorch and leaves them out
    ;;
with-ops)
    tag=$("$python" -c 'import sys, torch; print(f"torch{torch.__version__}-py{sys.version_info[0]}{sys.version_info[1]}-" + ("cuda" if torch.cuda.is_available() else "cpu"))' 2>/dev/null)
    wheels=${XDG_CACHE_HOME:-$HOME/.cache}/vision-rwkv/mmcv-$tag
    if ! ls "$wheels"/onedl_mmcv-*.whl >/dev/null 2>&1; then
        echo "Compiling mmcv's operators (about 10 minutes on two cores), once for this machine"
        mkdir -p "$wheels"
        build=$(mktemp -d "$wheels/build.XXXXXX")
        trap 'rm -rf "$build"' EXIT
        PATH=$(cd "$(dirname "$python")" && pwd):$PATH MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} \
            "$python" -m pip wheel -q --no-cache-dir --no-build-isolation --no-deps -w "$build" "$package"
        mv "$build"/onedl_mmcv-*.whl "$wheels"/ # whole or not at all
    fi
    "$python" -m pip install -q --force-reinstall --no-deps "$wheels"/onedl_mmcv-*.whl
    "$python" -m pip install -q "$package"
    has_ops || { echo "install_mmcv.sh: mmcv was installed, but mmcv.ops does not import" >&2; exit 1; }
    ;;
*)
    echo "install_mmcv.sh: expected with-ops or without-ops, got '$kind'" >&2
    exit 2
    ;;
esac
