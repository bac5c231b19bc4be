#!/usr/bin/env bash
# What a GPU can tell, in one call of under ten minutes: tests of exactness, precision and memory, then speed, as tables.
# Every part is made, whatever became of those before it; the exit code is 1 if any failed.
#
#     scripts/gpu_check.sh [--device cpu]
#
# --device cpu  all of it on a CPU and at small sizes, to see that it works
# OUT           where the output of each part goes
# PYTHON        the interpreter
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$here"

case "$*" in
    "")
        device=cuda
        scores=(--model ViT-L-14 --freeze_layers 18 --num_images 1000 --epochs 4)
        questions=(--device cuda --num_questions 5000 --num_images 1000)
        ;;
    "--device cpu")
        device=cpu
        scores=(--model RN50 --freeze_layers 3 --num_images 24 --epochs 1 --ours_only)
        questions=(--num_questions 640 --num_images 200 --num_hid 64)
        export CUDA_VISIBLE_DEVICES=
        ;;
    *) echo "error: $*: only --device cpu can be given" >&2 && exit 2 ;;
esac
if [ $device = cuda ]; then
    "$python" -c "import torch; torch.cuda.is_available() or exit('error: no usable GPU found; see --device cpu')"
fi

failed=0
# part NAME SECONDS COMMAND...: its output goes to OUT/NAME.txt too, and it is stopped when the time is over.
part() {
    local name=$1 most=$2 begun=$SECONDS
    shift 2
    echo "== $name: $*"
    if timeout --signal INT --kill-after 10 "$most" "$@" 2>&1 | tee "$out/$name.txt"; then
        echo "== $name: done in $((SECONDS - begun)) s"
    else
        echo "== $name: FAILED after $((SECONDS - begun)) s" && failed=1
    fi
}

part tests 240 env CHECK_DEVICE=$device "$python" -m pytest -m gpu -rs tests
part scores 200 "$python" bench/speed.py "${scores[@]}" --cases freeze_clip partial full
part questions 120 "$python" bench/vqa_speed.py "${questions[@]}"
exit $failed
