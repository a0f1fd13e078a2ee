#!/bin/sh
# Style, types and tests. Other arguments go to pytest: sh scripts/test.sh -k merge
#   sh scripts/test.sh          everything
#   sh scripts/test.sh --fast   not the tests that are marked slow, nor the types of other versions of Python
set -eu
EXTRA=test
. "$(dirname -- "$0")/env.sh"
cd "$ROOT"
OTHER_PYTHONS="3.10 3.13"  # the oldest and the newest that are supported
if [ "${1:-}" = --fast ]; then
    shift
    set -- -m "not slow" --numprocesses auto --maxprocesses 4 "$@"
    OTHER_PYTHONS=
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
for version in $OTHER_PYTHONS; do
    "$PYTHON" -m mypy --python-version "$version"
done
exec "$PYTHON" -m pytest "$@"
