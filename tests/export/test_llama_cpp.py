"""What llama.cpp computes of an exported model, and of an adapter beside it, is what we compute."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_miss import AdapterConfig, inject, load_adapter, load_model, merge, save_adapter
from rwkv_miss.adapters.inject import trained_parameters
from rwkv_miss.data.chat_template import as_jinja
from rwkv_miss.data.rendering import chat_prompt
from rwkv_miss.data.templates import TEMPLATES
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.export.table import ADAPTER_TARGETS, TARGETS
from rwkv_miss.export.target import Text
from rwkv_miss.merging.alone import write_alone
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.load import build_model

gguf = pytest.importorskip("gguf")
process = pytest.importorskip("rwkv_miss.export.llama_cpp_process")
SHAKESPEARE = "data/tinyshakespeare.txt"


def make_adapter(base: Path, folder: Path, size: float = 0.02, **settings) -> Path:
    """An adapter of random values beside all linears."""
    model = inject(load_model(base), AdapterConfig(**{"r": 8, **settings}))
    rng = torch.Generator().manual_seed(0)
    for p in trained_parameters(model).values():
        p.data.normal_(0, size, generator=rng)
    save_adapter(model, folder)
    return folder


def greedy(model: RWKV, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
    """The likeliest tokens after prompts of one length."""
    answers = []
    with torch.no_grad():
        logits, state = model(torch.tensor(prompts))
        for _ in range(n):
            answers.append(logits[:, -1].argmax(-1))
            logits, state = model(answers[-1][:, None], state)
    return torch.stack(answers, 1).tolist()


def started(model: Path, adapter: Path | None = None) -> Any:
    return process.start(str(model), adapter and str(adapter), 64)


def their_answer(server: Any, prompt: list[int], n: int) -> list[int]:
    """The same of llama.cpp."""
    found = process.complete(server, prompt, n_predict=n, n_probs=1)
    return [token["id"] for token in found["choices"][0]["logprobs"]["content"]]


def never_ends(file: Path) -> None:
    """Makes 255 the token that ends an answer, instead of 0, which is in every character of UTF-16."""
    reader = gguf.GGUFReader(file, "r+")
    for name in ("bos", "eos"):
        reader.fields[f"tokenizer.ggml.{name}_token_id"].parts[-1][0] = 255
    reader.data.flush()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-rwkv7-834K", "tiny-rwkv6-3m"])
def test_40_answers_are_ours(reference, tmp_path, name):
    """Of the file in each dtype, and of it with an adapter's file. Ours are of the weights that are in the file."""
    base = reference / "models" / f"{name}.pth"
    adapter = make_adapter(base, tmp_path / "adapter")
    text = (reference / SHAKESPEARE).read_text()[:2000].encode("utf-16-le" if "rwkv6" in name else "utf-8")
    prompts = [list(text[i * 40 : i * 40 + 24]) for i in range(40)]
    file, lora = tmp_path / "model.gguf", tmp_path / "adapter.gguf"
    write_alone(base, adapter, lora, replace(ADAPTER_TARGETS["gguf-lora"], runtime=None))
    for dtype in ("f32", "f16", "q8_0"):
        merge(base, [], file, dtype, overwrite=True, target=replace(TARGETS["gguf"], runtime=None))
        never_ends(file)
        model = build_model(TARGETS["gguf"].read(file), file, "fp32").eval()
        model.fingerprint = load_model(base).fingerprint
        for beside in (None, lora):
            if beside:
                load_adapter(model, adapter)
            server = started(file, beside)
            answers = [their_answer(server, prompt, 6) for prompt in prompts]
            same = sum(a == b for a, b in zip(answers, greedy(model, prompts, 6), strict=True))
            assert same == 40, (dtype, beside)
