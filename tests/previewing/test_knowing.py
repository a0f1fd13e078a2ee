"""Whether a base knows a template: which tokens are the template's own, and when a base is said not to know it."""

from __future__ import annotations

import json

import pytest
import torch

from rwkv_miss.cli import main
from rwkv_miss.config import PreviewConfig
from rwkv_miss.data.records import Record, Turn
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.previewing.found import Knowledge
from rwkv_miss.previewing.knowing import _kinds, knowledge, own_strings, warn_of

CONFIG = PreviewConfig(data="a.jsonl", tokenizer="bytes")
TURNS = (
    *(Turn("system", "Brief."), Turn("user", " Why\n\nnot? "), Turn("assistant", "No.")),
    *(Turn("user", "Oh"), Turn("assistant", "So.")),
)


class Certain:
    """A model to which every token of `sure` is certain wherever it comes, and of whose others each is as likely as
    the next: their loss is log(256)."""

    emb = torch.nn.Embedding(1, 1)

    def __init__(self, sure):
        self.sure = set(sure)

    def __call__(self, tokens):
        logits = torch.zeros(1, tokens.shape[1], 256)
        for i, token in enumerate(tokens[0, 1:].tolist()):
            if token in self.sure:
                logits[0, i, token] = 100
        return logits, None


def test_the_template_s_own_strings():
    assert own_strings(Record("a:1", TURNS), CONFIG) == [
        [
            *(("System: ", None), ("Brief.", False), ("\n\nUser: ", True), ("Why\nnot?", False)),
            ("\n\nAssistant:", True),
        ],
        [(" ", True), ("No.", False)],
    ]


@pytest.mark.parametrize("name", ["bytes", "world"])
def test_tokens_that_count(name):
    tokenizer = load_tokenizer(name)
    for span in own_strings(Record("a:1", TURNS), CONFIG):
        ids = tokenizer.encode("".join(text for text, _ in span))
        own = [tokenizer.decode([i]) for i, kind in zip(ids, _kinds(span, tokenizer, ids), strict=True) if kind]
        assert "".join(own) in ("\nUser: \nAssistant:", "User:Assistant:", "")


def test_what_a_model_loses_where():
    texts = [own_strings(Record("a:1", (Turn("user", "WHY"), Turn("assistant", "NO"))), CONFIG)] * 3
    sure = knowledge(Certain(b"\nAssistant:"), load_tokenizer("bytes"), texts)
    assert (sure.own, sure.own_tokens) == (pytest.approx(0, abs=1e-6), 3 * len("\nAssistant:"))
    assert (sure.text, sure.text_tokens) == (pytest.approx(5.545, abs=1e-3), 3 * len("WHYNO"))
    unsure = knowledge(Certain(b"WHYNO"), load_tokenizer("bytes"), texts)
    assert (unsure.own, unsure.text) == (pytest.approx(5.545, abs=1e-3), pytest.approx(0, abs=1e-6))


def test_when_it_is_said():
    assert not list(warn_of(None)) and not list(warn_of(Knowledge(1.0, 9, 2.0, 9)))
    (said,) = warn_of(Knowledge(1.01, 9, 2.0, 9))
    assert "does not seem to know the template" in said and "1.01 a token" in said


def test_a_base_is_asked(tmp_path, make_base, capsys):
    """A random one knows nothing; of plain text there is nothing to ask."""
    base = make_base(vocab_size=256, n_layer=1)
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "Why?", "answer": "Because."}) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "Because."}) + "\n")
    found = {}
    for name in "ab":
        command = ["preview", f"--data={tmp_path / name}.jsonl", "--tokenizer=bytes", f"--base={base}"]
        assert main([*command, "--ask_base", "--json"]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    assert found["a"]["knowledge"]["own_tokens"] == len("\nAssistant:") and found["b"]["knowledge"] is None
    assert any("does not seem to know" in said for said in found["a"]["warnings"])
    assert not any("does not seem to know" in said for said in found["b"]["warnings"])
