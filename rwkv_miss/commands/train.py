from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console

from rwkv_miss.config import TrainConfig


def run(config: TrainConfig) -> int:
    """Fine-tune an RWKV-6 or RWKV-7 checkpoint: an adapter such as MiSS, its initial state, or all of its weights."""
    from rwkv_miss.training.start import is_first_process, train

    if not is_first_process():  # of several processes only one prints
        logging.getLogger("rwkv_miss").setLevel(logging.ERROR)
    console = Console(quiet=not is_first_process(), markup=False)
    result = train(config, console)
    lines = [f"{result.steps} steps done{result.validation()}; adapter in {Path(config.out) / 'adapter'}"]
    if warning := result.warning():
        lines.append(warning)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    return 0
