#!/usr/bin/env bash
# The tuning guide's settings of the graph branch: a run for each of SETTINGS, compared on the validation fold.
#
#     scripts/vqa_isubgvqa.sh --sg_source gt [flags of main.py]
#
# SETTINGS  mgat_layers=alpha=beta, separated by spaces
flags=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin $# --sg_source predicted --epochs 4

flags=(--branches fine,graph "${flags[@]}")
for setting in ${SETTINGS:-4=1.0=10.0 6=1.5=15.0 3=0.8=8.0}; do
    IFS='=' read -r layers alpha beta <<<"$setting"
    train "layers-$layers" --mgat_layers "$layers" --alpha "$alpha" --beta "$beta" --no_test --no_report
done
compare
