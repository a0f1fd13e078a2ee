"""`python -m rwkv_miss.export.llama_cpp_process`: a GGUF file is run in llama.cpp, on the CPU.

On stdin a JSON object: model, adapter (or null): paths; prompts: lists of ids; likeliest: a number. The last line of
stdout is, for each prompt, [[id, log-probability], ...] of so many of the likeliest tokens after it, the likeliest
first.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import xllamacpp

# Bytes of a model below which a second thread costs more than it gains: the threads wait for each other busily.
_SMALL = 2**27


def start(model: str, adapter: str | None, longest: int) -> xllamacpp.Server:
    """A server of a model, and of an adapter beside it, for texts of at most so many tokens."""
    params = xllamacpp.CommonParams()
    params.model.path = model
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    params.n_ctx = longest
    params.n_gpu_layers = 0
    params.n_parallel = 1
    if os.path.getsize(model) < _SMALL:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.fit_params = False
    params.warmup = False
    params.verbosity = -1
    return xllamacpp.Server(params)


def complete(server: xllamacpp.Server, prompt: list[int], **options: Any) -> dict[str, Any]:
    """The answer of the server's /v1/completions, always taking the likeliest token."""
    request = {"prompt": prompt, "temperature": 0.0, "cache_prompt": False, **options}
    return server.handle_completions(request)


def main() -> None:
    asked = json.load(sys.stdin)
    server = start(asked["model"], asked["adapter"], max(map(len, asked["prompts"])) + 8)
    found = []
    for prompt in asked["prompts"]:
        # Whatever the model says, token 1 is taken, one byte of ASCII in every vocabulary: with a part of a character
        # the server waits for the rest of it, and gives no probabilities.
        answer = complete(server, prompt, n_predict=1, n_probs=asked["likeliest"], logit_bias=[[1, 1e6]])
        [first, *_] = answer["choices"][0]["logprobs"]["content"]
        found.append([[token["id"], token["logprob"]] for token in first["top_logprobs"]])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
