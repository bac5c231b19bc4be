#!/usr/bin/env bash
# A run within 24 GB of a GPU, by the tuning guide: batches of 48 questions.
#
#     scripts/vqa_24gb.sh [flags of main.py]
flags=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin $#

flags=(--batch_size 48 --gradient_accumulation_steps 1 "${flags[@]}")
train run --dynamic_batch_size --max_memory_usage 0.9
