# Sourced by the other scripts: sets PYTHON to one that has rwkv_miss (and the extra named in EXTRA, if any).
# An active virtual environment is used as it is; otherwise .venv is made in the repository at the first run.

ROOT=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
if [ -n "${VIRTUAL_ENV:-}" ]; then
    PYTHON=$VIRTUAL_ENV/bin/python
else
    PYTHON=$ROOT/.venv/bin/python
    [ -x "$PYTHON" ] || python3 -m venv "$ROOT/.venv"
fi
PREFIX=$("$PYTHON" -c 'import sys; print(sys.prefix)')

# Installed once, and again when the list of dependencies has changed: a copy of it is left in the environment.
installed() {
    for list in "$PREFIX/.rwkv_miss${EXTRA:+-$EXTRA}"*; do
        ! cmp -s "$ROOT/pyproject.toml" "$list" || return 0
    done
    return 1
}
if ! installed; then
    echo "installing rwkv_miss into $PREFIX (once; this can take some minutes)" >&2
    "$PYTHON" -m pip install --disable-pip-version-check --editable "$ROOT${EXTRA:+[$EXTRA]}" >&2
    cp "$ROOT/pyproject.toml" "$PREFIX/.rwkv_miss${EXTRA:+-$EXTRA}"
fi
