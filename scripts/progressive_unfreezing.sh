#!/usr/bin/env bash
# CLIP's last blocks thawed step by step, beside the same number of epochs with all of them thawed from the start.
#
#     scripts/progressive_unfreezing.sh [flags of baseline.py]
#
# PLAN    layers frozen @ epochs done; for 12 blocks 11@0,10@10,9@20
# LAST    blocks frozen in the run beside it
# EPOCHS  of both
flags=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin $# --lr 3e-4

train progressive --unfreeze_schedule "${PLAN:-22@0,20@10,18@20}" --epochs "${EPOCHS:-30}"
train from-the-start --partial_freeze --freeze_layers "${LAST:-18}" --epochs "${EPOCHS:-30}"
compare
