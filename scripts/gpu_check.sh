#!/bin/sh
# Builds every kernel, checks it against the reference, times it and training steps, and prints one table;
# --json FILE writes it to a file too, --other FILE.py times another's WKV-7 beside ours. What does not begin within
# --minutes (8) is skipped and named.
# Without a GPU it compiles what it can and says what it skipped.
set -eu
. "$(dirname -- "$0")/env.sh"
exec "$PYTHON" "$ROOT/scripts/gpu_check.py" "$@"
