#!/usr/bin/env bash
# The recommended run, CLIP's last blocks trained, beside the quick one that trains the heads alone.
#
#     scripts/recommended.sh [flags of baseline.py]
flags=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin $# --lr 3e-4 --epochs 8

flags=(--preset balanced "${flags[@]}")
train balanced
train fast --preset fast
compare
