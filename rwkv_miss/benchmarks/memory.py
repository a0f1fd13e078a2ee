"""Measures the memory that a training step takes, as its sequence grows, in a fresh process each time."""

from __future__ import annotations

from typing import Any

import torch

from rwkv_miss.adapters.inject import inject
from rwkv_miss.benchmarks.common import Table, apart, peak_bytes
from rwkv_miss.config import AdapterConfig, ModelConfig
from rwkv_miss.model.init import init_weights
from rwkv_miss.model.log_probs import batch_log_probs
from rwkv_miss.model.rwkv7 import RWKV7
from rwkv_miss.model.state import State

LENGTHS = (1024, 4096, 16384, 65536)
CHUNK_LEN = 512
MODES = {
    "whole rows": (None, 0),
    "exact": (CHUNK_LEN, 0),
    "cut after each chunk": (CHUNK_LEN, 1),
}
"""chunk_len and bptt_chunks of each."""
MODEL = ModelConfig(7, 4, 64, 1, 64, 256, 256, {"w": 16, "a": 16, "v": 16, "g": 16})


def bench_memory(thread_count: int) -> Table:
    """Peak memory, in MB, of a forward and backward pass over one sequence: a row for each of `MODES`, without and with
    gradient checkpointing, and a column for each of `LENGTHS`.

    On a GPU this is the peak of what PyTorch has allocated, on a CPU the peak of the process's resident memory. What
    the process held before the step, after a warm-up step of `CHUNK_LEN` tokens, is subtracted.
    """
    rows = []
    for name, (chunk_len, bptt_chunks) in MODES.items():
        for checkpointing in (False, True):
            row: dict[str, Any] = {"name": name, "gradient_checkpointing": "yes" if checkpointing else "no"}
            for length in LENGTHS:
                cell = (thread_count, checkpointing, length, chunk_len, bptt_chunks)
                row[f"T {length}"] = apart(step_bytes, *cell) / 1e6
            rows.append(row)
    kind = "allocated on the GPU" if torch.cuda.is_available() else "resident"
    return Table(f"A training step on one row of T tokens: MB {kind} at its peak, above what was before", rows)


def step_bytes(threads: int, checkpointing: bool, length: int, chunk_len: int | None, bptt_chunks: int) -> int:
    """This process's peak memory in a step of `length` tokens, in bytes, beyond what it held before."""
    torch.set_num_threads(threads)
    model = RWKV7(MODEL, gradient_checkpointing=checkpointing)
    model.load_state_dict(init_weights(MODEL, seed=0))
    inject(model, AdapterConfig(r=16)).to("cuda" if torch.cuda.is_available() else "cpu")
    _step(model, CHUNK_LEN, None, 0)  # warm-up: loads the kernels and allocates the gradients
    return peak_bytes(lambda: _step(model, length, chunk_len, bptt_chunks))


def _step(model: RWKV7, length: int, chunk_len: int | None, bptt_chunks: int) -> None:
    """As in training: a backward pass after each window, the state carried on without its gradient."""
    device = model.emb.weight.device
    tokens = torch.randint(MODEL.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(0)).to(device)
    state: State | None = None
    for start in range(0, length, size := chunk_len * bptt_chunks if chunk_len and bptt_chunks else length):
        stop = min(start + size, length)
        batch = {"tokens": tokens[:, start:stop], "targets": tokens[:, start + 1 : stop + 1]}
        batch["seq_start"] = torch.zeros_like(batch["tokens"], dtype=torch.bool)
        log_prob, state = batch_log_probs(model, batch, state, chunk_len)
        (-log_prob).backward()
        state = state.detach()
