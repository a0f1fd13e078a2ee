"""The harness's command line, in which our models are `--model rwkv-miss`. The harness finds no model that it does not
bring along; so it is started here, after ours has been registered:

python -m rwkv_miss.harness run --model rwkv-miss --model_args model=rwkv7.pth,tokenizer=world --tasks piqa
"""

from __future__ import annotations

import importlib
import sys

from rwkv_miss.errors import RunError, UserError


def main() -> int:
    """Runs it. 0: done; 1: the run failed; 2: an argument is wrong, or lm_eval is not installed."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        print(f"rwkv_miss.harness: {error.name} is not installed: pip install 'rwkv-miss[lm_eval]'", file=sys.stderr)
        return 2
    importlib.import_module("rwkv_miss.harness.model")
    try:
        cli_evaluate()
    except (UserError, RunError) as error:
        print(f"rwkv_miss.harness: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
