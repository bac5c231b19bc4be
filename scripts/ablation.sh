#!/usr/bin/env bash
# What each part is worth: freezing x heads x loss, 18 runs compared on the validation fold. The heads are residual with
# a calibrated base, residual without, and plain (which have no base to calibrate).
#
#     scripts/ablation.sh [flags of baseline.py]
flags=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin $# --lr 3e-4 --epochs 4

flags=(--preset medium "${flags[@]}")
declare -A freezing=(
    [frozen]="--freeze_clip --lr 1e-3"
    [partial]=""
    [full]="--no_partial_freeze"
)
declare -A heads=(
    [residual]=""
    [uncalibrated]="--no_calibration"
    [plain]="--no_residual_learning"
)
for freeze in frozen partial full; do
    for head in residual uncalibrated plain; do
        for loss in mse mse+plcc; do
            # shellcheck disable=SC2086  # these are several words each
            train "$freeze-$head-$loss" ${freezing[$freeze]} ${heads[$head]} --loss "$loss" --no_test --no_report
        done
    done
done
compare
