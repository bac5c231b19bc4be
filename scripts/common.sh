# What the scripts beside this one share; they source it. Each takes flags of baseline.py, vqa_*.sh those of main.py
# (without any: the demo), and
#
# OUT     where the runs go; a run that is finished there is not made again
# PYTHON  the interpreter
# shellcheck shell=bash
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
out=${OUT:-runs/$(basename "$0" .sh)}
runs=()
case $(basename "$0") in
    vqa_*) program=main.py output=--output ;;
    *) program=baseline.py output=--output_dir ;;
esac

# Flags of all runs: those given, or the ones named for the demo.
begin() {
    local given=$1
    shift
    if [ "$given" -eq 0 ]; then flags=(--demo "$@"); fi
    mkdir -p "$out"
}

# train NAME FLAGS...: one run; its own flags come last and win.
train() {
    local folder=$out/$1
    shift
    local asked="${flags[*]} $*"
    runs+=("$folder")
    if [ ! -f "$folder/results.json" ]; then
        echo "== $folder: $asked"
        echo "$asked" >"$folder.flags"
        "$python" "$here/$program" "${flags[@]}" "$@" "$output" "$folder" --overwrite
    elif [ "$(cat "$folder.flags")" = "$asked" ]; then
        echo "== $folder is finished"
    else
        echo "error: $folder was made with '$(cat "$folder.flags")'; name another place, as in OUT=runs/other" >&2
        exit 2
    fi
}

# One table of all runs, the best first, and a page with their curves.
compare() {
    echo
    "$python" "$here/report.py" "${runs[@]}"
}
