#!/usr/bin/env bash
# The demo: train a small classifier on handwritten digits with two processes, test the best checkpoint, draw.
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: $0 PYTHON vrwkv|vrwkv6" >&2; exit 2; }
PYTHON=$(realpath -s "$1") model=$2
export PYTHON
cd "$(dirname "${BASH_SOURCE[0]}")/.."
config=configs/classification/$model/${model}_digits.py
[ -f "$config" ] || { echo "error: there is no demo for '$model' ($config); try vrwkv or vrwkv6" >&2; exit 2; }
work_dir=work_dirs/demo/$model

"$PYTHON" tools/make_digits.py --out data/digits
rm -rf "$work_dir"
SECONDS=0
tools/dist_train.sh "$config" 2 --work-dir "$work_dir"
echo "trained in $SECONDS seconds"
tools/dist_test.sh "$config" "$work_dir/best.pth" 2 --work-dir "$work_dir/test" --out "$work_dir/predictions.pkl"
"$PYTHON" tools/draw_predictions.py "$work_dir/predictions.pkl" "$work_dir" "work_dirs/demo/$model.png" \
    --classes data/digits/classes.txt --title "${model^^} on handwritten digits" --at-least 97
