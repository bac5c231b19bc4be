#!/usr/bin/env bash
# How far the heads may move from what CLIP knows: one run for each of SCALES, compared on the validation fold.
#
#     scripts/sweep_residual_scale.sh [flags of baseline.py]
flags=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin $# --lr 3e-4 --epochs 8

flags=(--preset medium "${flags[@]}")
for scale in ${SCALES:-0.1 0.2 0.3 0.4}; do
    train "scale-$scale" --residual_scale_q "$scale" --residual_scale_c "$scale" --no_test --no_report
done
compare
