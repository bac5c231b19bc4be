#!/usr/bin/env bash
# The field's protocol on AGIQA-3K: ten prompt-disjoint splits (70 % train, 10 % validation, 20 % test) for each model,
# then one table for each, beside published numbers. Stopped, the same command goes on.
#
#     scripts/reproduce_agiqa3k.sh AGIQA-3K-FOLDER [OUTPUT_FOLDER] [further flags of baseline.py]
#
# MODELS   name=pretrained=frozen layers, separated by spaces
# REPEATS  splits for each model
# PYTHON   the interpreter
set -euo pipefail

data=${1:?usage: $0 AGIQA-3K-FOLDER [OUTPUT_FOLDER] [flags]}
out=${2:-runs/agiqa3k}
shift $(($# < 2 ? $# : 2))
models=${MODELS:-ViT-B-32=openai=8 ViT-L-14=openai=18}
repeats=${REPEATS:-10}
python=${PYTHON:-python}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

folders=()
for model in $models; do
    IFS='=' read -r name pretrained layers <<<"$model"
    folder=$out/$(basename "$name")-$(basename "$pretrained")
    folders+=("$folder")
    "$python" "$here/baseline.py" --dataset agiqa-3k --data_root "$data" \
        --clip_model "$name" --clip_pretrained "$pretrained" --partial_freeze --freeze_layers "$layers" \
        --crops 4 --test_crops 9 --global_view --epochs 20 --lr 3e-5 --head_lr 1e-3 --ema_decay 0.99 \
        --repeats "$repeats" --output_dir "$folder" "$@"
done

for folder in "${folders[@]}"; do
    echo
    echo "== $folder"
    "$python" "$here/protocol.py" "$folder"
done
if [ "${#folders[@]}" -gt 1 ]; then
    echo
    "$python" "$here/compare.py" "${folders[@]}"
fi
cat <<'TABLE'

Published, prompt-disjoint splits of AGIQA-3K (SROCC / PLCC; most papers do not say whether PLCC is raw or fitted):
                                                   quality          consistency
  ACL-IQA                                          .8969 / .9282    .7832 / .8800
  IPCE (CLIP ViT-B/32, fully tuned, 15 crops)      .8841 / .9246    .7697 / .8725
  LMM4LMM                                                           .8298 / .8976
  zero-shot CLIP                                                    .597  / .684
  zero-shot ImageReward                                             .730  / .786
  zero-shot PickScore                                               .732  / .779
TABLE
