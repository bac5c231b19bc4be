# What the scripts beside this one share; they source it. Each takes flags of baseline.py (without any: the demo) and
#
# OUT     where the runs go; a run that is finished there is not made again
# PYTHON  the interpreter
# shellcheck shell=bash
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
out=${OUT:-runs/$(basename "$0" .sh)}
runs=()

# Flags of all runs: those given, or the ones named for the demo.
begin() {
    local given=$1
    shift
    if [ "$given" -eq 0 ]; then flags=(--demo "$@"); fi
    mkdir -p "$out"
    if [ -f "$out/flags" ] && [ "$(cat "$out/flags")" != "${flags[*]}" ]; then
        echo "error: the runs in $out were made with '$(cat "$out/flags")'; name another folder, as in OUT=runs/other" >&2
        exit 2
    fi
    echo "${flags[*]}" >"$out/flags"
}

# train NAME FLAGS...: one run; its own flags come last and win.
train() {
    local folder=$out/$1
    shift
    runs+=("$folder")
    if [ -f "$folder/results.json" ]; then
        echo "== $folder is finished"
    else
        echo "== $folder: ${flags[*]} $*"
        "$python" "$here/baseline.py" "${flags[@]}" "$@" --output_dir "$folder" --overwrite
    fi
}

# One table of all runs, the best first, and a page with their curves.
compare() {
    echo
    "$python" "$here/report.py" "${runs[@]}"
}
