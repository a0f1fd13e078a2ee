"""What several test folders use."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkv_miss import AdapterConfig, inject, load_model, save_adapter
from rwkv_miss.adapters.inject import trained_parameters
from rwkv_miss.adapters.miss import MissLinear
from rwkv_miss.model.log_probs import batch_log_probs
from rwkv_miss.model.state import State


def adapters(model: nn.Module) -> dict[str, MissLinear]:
    """The linears with a MiSS adapter by module path, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MissLinear)}


def save_random_adapter(base: Path, folder: Path, config: AdapterConfig, std: float = 0.1, **extra: str) -> Path:
    """Saves an adapter for a base, its first values changed by normally distributed numbers, and `extra` recorded with
    it; returns its folder."""
    model = inject(load_model(base), config)
    rng = torch.Generator().manual_seed(0)
    for p in trained_parameters(model).values():
        p.data += std * torch.randn(p.shape, generator=rng)
    save_adapter(model, folder, extra)
    return folder


def loss_sum(*arguments, **options) -> tuple[Tensor, State]:
    """The sum of -log p over a batch's targets, and the state after it; arguments as in `batch_log_probs`."""
    log_prob, state = batch_log_probs(*arguments, **options)
    return -log_prob, state


def walk_page(page: str, run: Callable[[str], str], said_of: Callable[[str], str] = str) -> int:
    """Does what a page of documentation says, in the current folder, and asserts that it is true.

    Blocks of commands (sh) are run; other blocks with a language are files whose names stand before them, except for
    console, which is left out; blocks without a language are what the commands before them print.

    Args:
        run: what a command line prints.
        said_of: makes of a text that was printed what is compared of it.

    Returns:
        How many outputs were compared.
    """
    said, outputs = "", 0
    for before, language, block in re.findall(r"(.*?)\n\n```(\w*)\n(.*?)```", page, re.DOTALL):
        if language == "sh":
            said = "".join(run(line) for line in block.replace("\\\n", " ").splitlines())
        elif not language:
            assert said_of(block) == said_of(said)
            outputs += 1
        elif language != "console":
            Path(re.findall(r"`([\w.]+)`", before)[-1]).write_text(block)
    return outputs


class RunsCode:
    """Unpickled, this makes a folder: the proof that code ran."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)
