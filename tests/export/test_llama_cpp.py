"""What llama.cpp computes of an exported model, and of an adapter beside it, is what we compute."""

from __future__ import annotations

import json
import random
import unicodedata
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_miss import AdapterConfig, load_adapter, load_model, merge
from rwkv_miss.data.chat_template import as_jinja
from rwkv_miss.data.rendering import chat_prompt
from rwkv_miss.data.templates import TEMPLATES
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.export.table import ADAPTER_TARGETS, TARGETS
from rwkv_miss.export.target import Text
from rwkv_miss.merging.alone import write_alone
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.load import build_model
from tests.helpers import save_random_adapter

gguf = pytest.importorskip("gguf")
process = pytest.importorskip("rwkv_miss.export.llama_cpp_process")
SHAKESPEARE = "data/tinyshakespeare.txt"


def make_adapter(base: Path, folder: Path, size: float = 0.01, **settings) -> Path:
    """An adapter of random values beside all linears."""
    return save_random_adapter(base, folder, AdapterConfig(**{"r": 8, **settings}), size)


def greedy(model: RWKV, prompts: Sequence[Sequence[int]], n: int) -> Tensor:
    """The logits (prompts, n, V) of the likeliest tokens after prompts of one length."""
    found = []
    with torch.no_grad():
        logits, state = model(torch.tensor(prompts))
        for _ in range(n):
            found.append(logits[:, -1])
            logits, state = model(found[-1].argmax(-1, keepdim=True), state)
    return torch.stack(found, 1)


def started(model: Path, adapter: Path | None = None) -> Any:
    return process.start(str(model), adapter and str(adapter), 64)


def differences(model: Path, adapter: Path | None, prompts: list[list[int]], logits: Tensor) -> list[float]:
    """Of each answer of llama.cpp's that is not ours: how much likelier, in logits, our first other token is."""
    server, found = started(model, adapter), []
    for prompt, own in zip(prompts, logits, strict=True):
        answer = process.complete(server, prompt, n_predict=len(own), n_probs=1)
        for token, at in zip(answer["choices"][0]["logprobs"]["content"], own, strict=True):
            if token["id"] != at.argmax().item():
                found.append((at.max() - at[token["id"]]).item())
                break
    return found


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
    for dtype, rounding in {"f32": 0.0, "f16": 0.0, "q8_0": 0.05}.items():
        merge(base, [], file, dtype, overwrite=True, target=replace(TARGETS["gguf"], runtime=None))
        never_ends(file)
        model = build_model(TARGETS["gguf"].read(file), file, "fp32").eval()
        model.fingerprint = load_model(base).fingerprint
        alone = greedy(model, prompts, 6)
        adapted = greedy(load_adapter(model, adapter), prompts, 6)
        assert (alone.argmax(-1) != adapted.argmax(-1)).any(-1).sum() > 10
        found = differences(file, None, prompts, alone) + differences(file, lora, prompts, adapted)
        assert len(found) <= 4 and max(found, default=0.0) <= rounding, (dtype, found)


@pytest.fixture
def small_base(request, tmp_path, make_base, random_weights6) -> Path:
    """A random base of the version that the test's parameter says, in sizes that llama.cpp computes."""
    if request.param == 7:
        return make_base(n_embd=64, head_size=32)
    torch.save(random_weights6, tmp_path / "base.pth")
    return tmp_path / "base.pth"


@pytest.mark.slow
@pytest.mark.parametrize("small_base", [6, 7], indirect=True)
@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"att.key": 3}},
        {"method": "mini", "options": {"mini_r": 4}},
        {"method": "lora", "r": 6, "options": {"alpha": 7.0, "rank_stabilized": True}},
    ],
    ids=["miss", "mini", "lora"],
)
def test_an_adapters_file_is_run(small_base, tmp_path, settings):
    """In one of random values everything counts: names, order and transposes, rank, scale."""
    adapter = make_adapter(small_base, tmp_path / "adapter", 0.3, **settings)
    report = write_alone(small_base, adapter, tmp_path / "adapter.gguf", ADAPTER_TARGETS["gguf-lora"])
    assert report.ran.agreeing == report.ran.prompts == 8
    assert report.ran.error < 1e-5 and "xllamacpp 20" in report.ran.runtime


@pytest.mark.slow
@pytest.mark.parametrize("small_base", [6, 7], indirect=True)
@pytest.mark.parametrize(("dtype", "most"), [("f32", 1e-5), ("q8_0", 0.06)])
def test_a_model_with_its_adapter_merged_is_run(small_base, tmp_path, dtype, most):
    adapter = make_adapter(small_base, tmp_path / "adapter", 0.3)
    report = merge(small_base, adapter, tmp_path / "merged.gguf", dtype, target=TARGETS["gguf"])
    assert report.ran.error < most < report.logits_effect / 10
    assert (report.logits_error is None) == (dtype == "q8_0")


@pytest.fixture(scope="module")
def world(tmp_path_factory, random_weights) -> Any:
    """A small model with the World vocabulary and the template g1-think, in a server of llama.cpp."""
    folder = tmp_path_factory.mktemp("world")
    torch.save(random_weights(n_layer=2, n_embd=32, head_size=32, vocab_size=65536), folder / "base.pth")
    text = Text("small", load_tokenizer("world").pieces(), as_jinja(TEMPLATES["g1-think"]))
    target = replace(TARGETS["gguf"], runtime=None)
    merge(folder / "base.pth", [], folder / "model.gguf", "f16", target=target, text=text)
    return started(folder / "model.gguf")


def post(server: Any, path: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_the_tokens_of_100_000_characters_in_many_scripts(world):
    """Every assigned character up to U+2FFFF once, beside letters, white space, escapes and quotes."""
    tokenizer, rng = load_tokenizer("world"), random.Random(0)
    known = [c for c in map(chr, range(1, 0x30000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    rest = rng.choices(
        ["the ", "\n\n", "\\n", "'", '"', " \t", "0x1F", "Grüße", "今天。\n", "é", "नमस्ते", "🙂"], k=20_000
    )
    pieces = [*known, *rest]
    rng.shuffle(pieces)
    text = "".join(pieces)
    assert len(text) > 100_000
    for start in range(0, len(text), 10_000):
        part = text[start : start + 10_000]
        assert post(world, "/tokenize", content=part)["tokens"] == tokenizer.encode(part)


@pytest.mark.slow
@pytest.mark.parametrize(("token", "ends"), [(0, True), (261, True), (11, False), (28329, False), (3336, False)])
def test_which_tokens_end_an_answer(world, token, ends):
    """Token 0 and a blank line, but neither a line's end nor the tokens that a blank line is a part of."""
    found = process.complete(world, [1, 2], n_predict=3, logit_bias=[[token, 1000.0]])
    assert found["choices"][0]["finish_reason"] == ("stop" if ends else "length")
    assert found["usage"]["completion_tokens"] == (1 if ends else 3)


@pytest.mark.slow
def test_the_prompt_of_a_chat_is_ours(world):
    question = " Hi\r\n\r\nthere \n\n\n you"
    asked = post(world, "/apply-template", messages=[{"role": "user", "content": question}])
    assert asked["prompt"] == chat_prompt(question, TEMPLATES["g1-think"])
    without = post(
        world,
        "/apply-template",
        messages=[
            {"role": "system", "content": "S"},
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": " <think>\nt\n</think>\nA "},
            {"role": "user", "content": "R"},
        ],
        chat_template_kwargs={"enable_thinking": False},
    )
    assert without["prompt"] == "System: S\n\nUser: Q\n\nAssistant: A\n\nUser: R\n\nAssistant: <think>\n</think"
