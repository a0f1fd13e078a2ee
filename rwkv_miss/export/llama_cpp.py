"""llama.cpp, by the Python package xllamacpp, which holds it compiled. It runs in a process of its own
(`llama_cpp_process`): where it meets what it does not expect, it ends the process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rwkv_miss.errors import RunError
from rwkv_miss.export.target import Runtime

# The likeliest tokens of which it is asked for the probabilities.
_LIKELIEST = 64


def _log_probs(model: Path, adapter: Path | None, prompts: Sequence[Sequence[int]]) -> list[Mapping[int, float]]:
    asked = {"model": str(model), "adapter": adapter and str(adapter), "prompts": prompts, "likeliest": _LIKELIEST}
    command = [sys.executable, "-m", "rwkv_miss.export.llama_cpp_process"]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise RunError(f"llama.cpp cannot run the written file ({' / '.join(said[-3:])}); nothing was written")
    return [{i: p for i, p in found} for found in json.loads(done.stdout.splitlines()[-1])]


RUNTIME = Runtime("xllamacpp", "xllamacpp", "llama", _log_probs)
