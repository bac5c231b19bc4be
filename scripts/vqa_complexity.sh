#!/usr/bin/env bash
# The tuning guide's sizes of the fine branch: a run for each of SIZES, compared on the validation fold.
#
#     scripts/vqa_complexity.sh [flags of main.py]
#
# SIZES  AOA_layers=num_hid, separated by spaces; the demo has smaller ones
flags=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin $# --epochs 4

sizes="4=512 6=1024 8=2048"
if [ $# -eq 0 ]; then sizes="0=64 1=128 2=256"; fi
for size in ${SIZES:-$sizes}; do
    IFS='=' read -r layers width <<<"$size"
    train "layers-$layers-width-$width" --AOA_layers "$layers" --num_hid "$width" --no_test --no_report
done
compare
