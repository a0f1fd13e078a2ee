#!/bin/sh
# Builds every kernel, checks it against the reference, times it and a training step, and prints one table.
# Without a GPU it compiles what it can and says what it skipped.
set -eu
. "$(dirname -- "$0")/env.sh"
exec "$PYTHON" "$ROOT/scripts/gpu_check.py" "$@"
