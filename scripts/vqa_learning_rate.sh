#!/usr/bin/env bash
# The tuning guide's learning rates, of all and of X-VLM: a run for each of RATES, compared on the validation fold.
#
#     scripts/vqa_learning_rate.sh [flags of main.py]
#
# RATES  lr=xvlm_lr, separated by spaces
flags=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin $# --epochs 4

for rates in ${RATES:-2.8e-4=5e-5 3.5e-4=7e-5 2e-4=3e-5}; do
    IFS='=' read -r lr xvlm_lr <<<"$rates"
    train "lr-$lr" --lr "$lr" --xvlm_lr "$xvlm_lr" --no_test --no_report
done
compare
