#!/usr/bin/env bash
# What each branch is worth, alone and mixed with others: a run for each of BRANCHES, on the test fold, with paired
# differences to the first.
#
#     scripts/vqa_ablation.sh [flags of main.py]
#
# BRANCHES  names or mixtures of --branches, separated by spaces
flags=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin $# --sg_source predicted --epochs 4

for branches in ${BRANCHES:-fine coarse graph fine,coarse fine,graph fine,coarse,graph}; do
    train "${branches//,/-}" --branches "$branches"
done
compare
"$python" "$here/compare.py" "${runs[@]}"
