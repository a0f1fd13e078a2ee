# Sourced by the other scripts: sets PYTHON to one that has rwkv_miss (and the extra named in EXTRA, if any).
# An active virtual environment is used as it is; otherwise .venv is made in the repository at the first run.

ROOT=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
if [ -n "${VIRTUAL_ENV:-}" ]; then
    PYTHON=$VIRTUAL_ENV/bin/python
else
    PYTHON=$ROOT/.venv/bin/python
    [ -x "$PYTHON" ] || python3 -m venv "$ROOT/.venv"
fi
WANTED="$ROOT${EXTRA:+[$EXTRA]}"
STAMP=$("$PYTHON" -c 'import sys; print(sys.prefix)')/.rwkv_miss${EXTRA:+-$EXTRA}
# Installed once, and again when the list of dependencies has changed.
if ! cmp -s "$ROOT/pyproject.toml" "$STAMP"; then
    echo "installing rwkv_miss into $(dirname -- "$STAMP") (once; this can take some minutes)" >&2
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable "$WANTED" >&2
    cp "$ROOT/pyproject.toml" "$STAMP"
fi
