#!/usr/bin/env bash
# The demos of detection and segmentation: make scenes of digits, train with two processes, test the best checkpoint, draw.
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: $0 PYTHON detection|segmentation" >&2; exit 2; }
PYTHON=$(realpath -s "$1") task=$2
export PYTHON
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case $task in
detection)
    config=configs/detection/mask_rcnn/mask_rcnn_vrwkv_adapter_digits.py
    bars=(coco/bbox_mAP_50=0.60 coco/segm_mAP_50=0.55)
    ;;
segmentation)
    config=configs/segmentation/digits/upernet_vrwkv_adapter_digits.py
    bars=(mIoU=70)
    ;;
*)
    echo "error: expected detection or segmentation, got '$task'" >&2
    exit 2
    ;;
esac
work_dir=work_dirs/demo/$task

"$PYTHON" tools/make_digits.py --kind "$task" --out "data/digits_$task"
rm -rf "$work_dir"
SECONDS=0
tools/dist_train.sh "$config" 2 --work-dir "$work_dir"
tools/dist_test.sh "$config" "$work_dir/best.pth" 2 --work-dir "$work_dir/test" --out "$work_dir/predictions.pkl"
echo "trained and tested in $SECONDS seconds"
"$PYTHON" tools/draw_scenes.py "$work_dir/predictions.pkl" "$work_dir/test" "work_dirs/demo/$task.png" \
    --classes "data/digits_$task/classes.txt" --title "$config" --at-least "${bars[@]}"
