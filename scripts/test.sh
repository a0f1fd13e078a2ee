#!/bin/sh
# Style, types and tests.
#   sh scripts/test.sh            everything
#   sh scripts/test.sh --fast     not the tests that are marked slow, nor the types of other versions of Python
#   sh scripts/test.sh -k merge   the tests that pytest selects by such arguments
set -eu
EXTRA=test
. "$(dirname -- "$0")/env.sh"
cd "$ROOT"
FAST=
[ "${1:-}" != --fast ] || { FAST=1; shift; }

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
VERSIONS=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ -n "$FAST" ] || VERSIONS="3.10 $VERSIONS 3.13"  # the oldest and the newest that are supported
# shellcheck disable=SC2086
printf '%s\n' $VERSIONS | sort -u | xargs -n 1 -P 2 "$PYTHON" -m mypy --python-version

together() { # runs tests in parallel; worksteal leaves those of a file, which share what is slow to make, to one process
    "$PYTHON" -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal "$@"
}
if [ -n "$FAST" ]; then
    together -m "not slow" "$@"
elif [ $# -gt 0 ]; then
    "$PYTHON" -m pytest "$@"
else
    together
fi
