#!/bin/sh
# Fine-tunes an RWKV-6 or RWKV-7 with MiSS. Alone it runs the demo: see README.md.
#   sh scripts/run_miss.sh
#   sh scripts/run_miss.sh --base rwkv7.pth --data my.jsonl [any option of `rwkv-miss train`]
set -eu

# A fine-tune of your own: edit these, or give them as arguments (--base, --adapter.r, --ctx_len, --lr, ...).
BASE=               # a .pth in BlinkDL's layout; empty: the demo
DATA=               # .jsonl (text, messages, or question and answer) or .txt
TOKENIZER=world     # world, bytes, or a tokenizer.json
OUT=out/miss
R=64
CTX_LEN=512
BATCH=8             # rows in a micro-batch, on each device
ACCUMULATE=1        # micro-batches in an optimizer step
EPOCHS=1
LR=2e-5
DEVICES=1
STRATEGY=auto       # auto, ddp, deepspeed_stage_1, deepspeed_stage_2, deepspeed_stage_3
PRECISION=auto      # auto (the base's own), bf16, fp32
TEST=               # .jsonl of questions to answer before and after; empty: none

# The demo's own settings, where no base is given. fp32: its matrices are too small to gain from bf16 on a CPU.
DEMO="--adapter.r 32 --ctx_len 432 --batch_size 2 --max_steps 160 --lr 5e-3 --warmup_steps 5 --precision fp32"
DEMO_EVAL="--dtype fp32 --batch_size 200 --max_tokens 100"

. "$(dirname -- "$0")/env.sh"

# This script reads these options itself; every other argument goes to `rwkv-miss train` as it is.
n=$#
while [ "$n" -gt 0 ]; do
    arg=$1
    shift
    n=$((n - 1))
    case $arg in
        --base | --data | --tokenizer | --out | --test)
            [ "$n" -gt 0 ] || { echo "run_miss.sh: $arg needs a value" >&2; exit 2; }
            arg=$arg=$1
            shift
            n=$((n - 1))
            ;;
    esac
    case $arg in
        --base=*) BASE=${arg#*=} ;;
        --data=*) DATA=${arg#*=} ;;
        --tokenizer=*) TOKENIZER=${arg#*=} ;;
        --out=*) OUT=${arg#*=} ;;
        --test=*) TEST=${arg#*=} ;;
        *) set -- "$@" "$arg" ;;
    esac
done

if [ -z "$BASE" ]; then
    [ -z "$DATA" ] || { echo "run_miss.sh: --data needs --base, the checkpoint to fine-tune" >&2; exit 2; }
    BASE=$ROOT/scripts/demo/base.pth
    DATA=$ROOT/scripts/demo/train.jsonl
    TEST=$ROOT/scripts/demo/heldout.jsonl
    TOKENIZER=bytes
    [ "$OUT" != out/miss ] || { OUT=out/demo; set -- --overwrite true "$@"; }
    # shellcheck disable=SC2086
    set -- $DEMO "$@"
else
    DEMO_EVAL=
fi
[ -n "$DATA" ] || { echo "run_miss.sh: --base needs --data, what to train on" >&2; exit 2; }

answer() { # the questions of TEST, by the model and options given
    "$PYTHON" -m rwkv_miss eval --data "$TEST" --tokenizer "$TOKENIZER" --exact_match true --show 1 $DEMO_EVAL "$@"
}

[ -z "$TEST" ] || { echo "== before"; answer --model "$BASE"; }
echo "== training"
"$PYTHON" -m rwkv_miss train --base "$BASE" --data "$DATA" --tokenizer "$TOKENIZER" --out "$OUT" \
    --adapter.r "$R" --ctx_len "$CTX_LEN" --batch_size "$BATCH" --accumulate "$ACCUMULATE" --epochs "$EPOCHS" \
    --lr "$LR" --devices "$DEVICES" --strategy "$STRATEGY" --precision "$PRECISION" "$@"
[ -z "$TEST" ] || { echo "== after"; answer --model "$BASE" --adapter "$OUT/adapter"; }
