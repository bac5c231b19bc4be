#!/usr/bin/env bash
# The learning rate, which matters most: one run for each of LRS, compared on the validation fold.
#
#     scripts/sweep_lr.sh [flags of baseline.py]
flags=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin $# --epochs 8

flags=(--preset medium "${flags[@]}")
for lr in ${LRS:-1e-5 3e-5 1e-4 3e-4 1e-3}; do
    train "lr-$lr" --lr "$lr" --no_test --no_report
done
compare
