#!/bin/sh
# Style, then every test. Arguments go to pytest: sh scripts/test.sh -k merge
set -eu
EXTRA=test
. "$(dirname -- "$0")/env.sh"
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest "$@"
