"""Pre-trains the demo's base model, base.pth, from nothing on a CPU.

It learns to read the sentences of people.py: to copy, to look a fact up, to list facts, to say a sentence in other
words. It never sees JSON: braces and double quotes occur only as characters of random strings to copy. (They must
occur there: a byte that never occurs gets no direction of its own in the head, and a fine-tune with an adapter leaves
the head frozen.)

2.7 million tokens. A step takes 0.23 s on two cores with little else to do, 5 minutes in all; the committed file
took 7.5 minutes on two busy ones. The mean loss should be near 1.2 at step 200 (copying found), 0.15 at step 650 and
0.024 at the end; what is left is the free choice of words in "Say it in other words". If it is above 2.5 at step 200,
copying was not found in time: give more copy_steps or another seed. The same seed and number of threads gave the
same file, to the bit, twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from jsonargparse import CLI
from make_data import HERE, heldout_names
from people import lesson, repeat
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from rwkv_miss.checkpoint import TensorSpec, write_pth
from rwkv_miss.config import DataOptions, ModelConfig
from rwkv_miss.data.batches import BatchStream
from rwkv_miss.data.documents import encode_record
from rwkv_miss.data.packing import make_rows
from rwkv_miss.data.records import Record, Turn
from rwkv_miss.data.rows import NO_LOSS
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.files import atomic_write
from rwkv_miss.model.init import init_weights
from rwkv_miss.model.rwkv7 import RWKV7

CONFIG = ModelConfig(
    version=7,
    n_layer=4,
    n_embd=128,
    n_head=4,
    head_size=32,
    dim_ffn=512,
    vocab_size=256,
    low_rank={"w": 16, "a": 16, "v": 16, "g": 32},
)
# The form of the answers that the committed base learned.
OPTIONS = DataOptions(answer_lines="join", answer_end="blank_line")
CTX_LEN, BATCH_SIZE = 256, 8
LR, WARMUP_STEPS, LR_END, WEIGHT_DECAY = 2.5e-3, 20, 0.05, 0.1


def make_base(
    out: Path = HERE / "base.pth", seed: int = 0, copy_steps: int = 200, steps: int = 1300, threads: int = 2
) -> None:
    """Trains for `steps` steps, the first `copy_steps` of them on nothing but copying random strings: a model that
    can copy learns the rest fast, but takes several times as long to learn copying if it is mixed with the rest."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    rng = Random(seed)
    names = heldout_names(HERE / "heldout.jsonl")
    copying = _batches(lambda: repeat(rng), copy_steps, seed)
    everything = _batches(lambda: lesson(rng, names), steps - copy_steps, seed)

    model = RWKV7(CONFIG)
    model.load_state_dict(init_weights(CONFIG, seed))
    matrices = [p for p in model.parameters() if p.squeeze().ndim == 2]
    vectors = [p for p in model.parameters() if p.squeeze().ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.99))
    began = time.perf_counter()
    losses = []
    for step, batch in enumerate(chain(copying, everything)):
        for group in optimizer.param_groups:
            group["lr"] = LR * _lr_scale(step, steps)
        logits, _ = model(batch["tokens"], seq_start=batch["seq_start"])
        loss = cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=NO_LOSS)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            mean = sum(losses[-50:]) / len(losses[-50:])
            print(f"step {step + 1}/{steps}  loss {mean:.4f}  {time.perf_counter() - began:.0f} s", flush=True)

    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    with atomic_write(out) as part:
        write_pth(part, {name: TensorSpec(w.shape, w.dtype) for name, w in weights.items()}, weights.__getitem__)
    print(f"{out}: {sum(w.numel() for w in weights.values()):,} parameters, {out.stat().st_size:,} bytes")


def _batches(make: Callable[[], tuple[str, str]], steps: int, seed: int) -> Iterator[dict[str, Any]]:
    """`steps` batches of questions and answers that `make` invents, none of them twice."""
    tokenizer = load_tokenizer("bytes")
    documents, tokens = [], 0
    while tokens < steps * BATCH_SIZE * CTX_LEN:
        question, answer = make()
        record = Record("make_base", (Turn("user", question), Turn("assistant", answer)))
        documents.append(encode_record(record, tokenizer, CONFIG.vocab_size, OPTIONS))
        tokens += len(documents[-1].ids) - 1
    rows, _ = make_rows(documents, CTX_LEN, packing=True)
    stream = BatchStream(
        rows, batch_size=BATCH_SIZE, accumulate=1, rank=0, world_size=1, seed=seed, shuffle=True, trim=False
    )
    return islice(stream, steps)


def _lr_scale(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from 1 down to LR_END."""
    falling = LR_END + (1 - LR_END) * (1 + math.cos(math.pi * step / steps)) / 2
    return min(1, (step + 1) / WARMUP_STEPS) * falling


if __name__ == "__main__":
    CLI(make_base, as_positional=False)
