#!/usr/bin/env bash
# Two stages: the heads on a frozen CLIP first, then its last blocks from there, beside the same blocks in one stage.
#
#     scripts/two_stage.sh [flags of baseline.py]
#
# LAYERS  blocks that stay frozen in the second stage: 20 of 24, 10 of 12
# EPOCHS  of the first and the second stage
flags=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin $#

read -r first second <<<"${EPOCHS:-10 20}"
partial=(--partial_freeze --freeze_layers "${LAYERS:-20}" --epochs "$second")
train stage-1 --freeze_clip --epochs "$first" --lr 1e-3
train stage-2 --init_from "$out/stage-1" "${partial[@]}" --lr 1e-5
train one-stage "${partial[@]}" --lr 3e-5
compare
