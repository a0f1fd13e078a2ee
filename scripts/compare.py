"""Answers a few questions with base + adapter, with the merged file, and with the merged file in the `rwkv`
package where that is installed; exits with 1 where they are not the same."""

from __future__ import annotations

import importlib.util
import os
import sys
from itertools import islice

import jsonargparse

from rwkv_miss import load_adapter, load_model
from rwkv_miss.config import DataOptions
from rwkv_miss.data.readers.reader import read_records
from rwkv_miss.data.rendering import prompt_text
from rwkv_miss.data.templates import TEMPLATES
from rwkv_miss.data.tokenizers import END, Tokenizer, load_tokenizer
from rwkv_miss.generation.generate import generate

[STOP] = TEMPLATES["world"].stops


def rwkv_package(merged: str, version: int, tokenizer: Tokenizer, prompts: list[str], max_tokens: int) -> list[str]:
    """Greedy answers by the `rwkv` package in fp32, its forward alone."""
    if version == 7:
        os.environ["RWKV_V7_ON"] = "1"  # how the package is told to expect RWKV-7; read when it is imported
    from rwkv.model import RWKV

    model = RWKV(model=merged.removesuffix(".pth"), strategy="cpu fp32")
    answers = []
    for prompt in prompts:
        logits, state = model.forward(tokenizer.encode(prompt), None)
        written: list[int] = []
        while len(written) < max_tokens and (token := int(logits.argmax())) != END:
            written.append(token)
            if STOP in tokenizer.decode(written):
                break
            logits, state = model.forward([token], state)
        answers.append(tokenizer.decode(written).split(STOP)[0])
    return answers


def compare(
    base: str, adapter: str, merged: str, questions: str, tokenizer: str, count: int = 3, max_tokens: int = 256
) -> int:
    tok = load_tokenizer(tokenizer)
    # All run in fp32, as the package's CPU strategy does, so that only the files differ.
    options = DataOptions()
    prompts = [prompt_text(record, options) for record in islice(read_records(questions, options), count)]
    merged_model = load_model(merged, "fp32").eval()
    version = merged_model.config.version
    answers = {
        "base + adapter": generate(
            load_adapter(load_model(base, "fp32"), adapter).eval(), tok, prompts, max_tokens, stop=(STOP,)
        ),
        "merged file": generate(merged_model, tok, prompts, max_tokens, stop=(STOP,)),
    }
    if importlib.util.find_spec("rwkv"):
        answers["merged file in the rwkv package"] = rwkv_package(merged, version, tok, prompts, max_tokens)
    else:
        print("the rwkv package is not installed (pip install rwkv), so the merged file was not run in it")
    for i, prompt in enumerate(prompts):
        print(f"\n{prompt}")
        for name, given in answers.items():
            print(f"  {name:<32}{given[i].strip()}")
    same = len({tuple(given) for given in answers.values()}) == 1
    print("\nthe same answers from all" if same else "\nthe answers differ")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(jsonargparse.CLI(compare, as_positional=False))
