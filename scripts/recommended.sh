#!/usr/bin/env bash
# The recommended run, CLIP's last blocks trained, beside the quick one that trains the heads alone.
#
#     scripts/recommended.sh [flags of baseline.py]
flags=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin $#

demo=()
if [ $# -eq 0 ]; then demo=(--lr 3e-4 --epochs 8); fi  # what suits its tiny CLIP
train balanced --preset balanced "${demo[@]}"
train fast --preset fast
compare
