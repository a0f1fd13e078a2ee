#!/bin/sh
# Writes base + adapter as one .pth that RWKV runtimes read, checks it, and shows its answers.
#   sh scripts/merge_miss.sh                     after the demo
#   sh scripts/merge_miss.sh --run out/miss --out merged.pth
set -eu

RUN=out/demo        # the output folder of a run
BASE=               # empty: the base that the run's config.yaml names
OUT=                # empty: RUN/merged.pth, which replaces that of an earlier merge
OVERWRITE=false     # replace OUT if it is there
DTYPE=              # bf16, fp16, fp32; empty: the base's own
TEST=               # .jsonl of questions to show answers of; empty: the demo's, for the demo's base

. "$(dirname -- "$0")/env.sh"

while [ $# -gt 0 ]; do
    case $1 in
        --*=*) name=${1%%=*} value=${1#*=}; shift ;;
        *)
            [ $# -gt 1 ] || { echo "merge_miss.sh: $1 needs a value" >&2; exit 2; }
            name=$1 value=$2
            shift 2
            ;;
    esac
    case $name in
        --run) RUN=$value ;;
        --base) BASE=$value ;;
        --out) OUT=$value ;;
        --overwrite) OVERWRITE=$value ;;
        --dtype) DTYPE=$value ;;
        --test) TEST=$value ;;
        *) echo "merge_miss.sh: unknown option $name; there are --run --base --out --overwrite --dtype --test" >&2; exit 2 ;;
    esac
done

setting() { # of the run, from its config.yaml
    "$PYTHON" -c 'import sys, yaml; print(yaml.safe_load(open(sys.argv[1]))[sys.argv[2]])' "$RUN/config.yaml" "$1"
}

[ -f "$RUN/config.yaml" ] || { echo "merge_miss.sh: $RUN: holds no run (no config.yaml); give --run" >&2; exit 2; }
BASE=${BASE:-$(setting base)}
[ -n "$OUT" ] || { OUT=$RUN/merged.pth; OVERWRITE=true; }
[ -n "$TEST" ] || [ "$BASE" != "$ROOT/scripts/demo/base.pth" ] || TEST=$ROOT/scripts/demo/heldout.jsonl

"$PYTHON" -m rwkv_miss merge --base "$BASE" --adapter "$RUN/adapter" --out "$OUT" --overwrite "$OVERWRITE" \
    ${DTYPE:+--dtype "$DTYPE"}
[ -z "$TEST" ] || "$PYTHON" "$ROOT/scripts/compare.py" --base "$BASE" --adapter "$RUN/adapter" --merged "$OUT" \
    --questions "$TEST" --tokenizer "$(setting tokenizer)"
