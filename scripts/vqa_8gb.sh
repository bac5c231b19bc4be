#!/usr/bin/env bash
# A run within 8 GB of a GPU, by the tuning guide: batches of 16 questions, more of them a step, half precision.
#
#     scripts/vqa_8gb.sh [flags of main.py]
flags=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin $#

flags=(--batch_size 16 --gradient_accumulation_steps 4 --mixed_precision "${flags[@]}")
train run --dynamic_batch_size --max_memory_usage 0.7
