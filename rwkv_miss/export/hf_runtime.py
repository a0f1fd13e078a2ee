"""What rwkv7-hf computes of a Hugging Face folder, with an adapter as HF PEFT loads it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch


@torch.no_grad()
def log_probs(path: Path, adapter: Path | None, prompts: Sequence[Sequence[int]]) -> Sequence[Mapping[int, float]]:
    """As `Runtime.log_probs`, computed in fp32."""
    from rwkv7_hf import RWKV7ForCausalLM

    found = []
    with quiet_transformers():
        model = RWKV7ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter)
        for prompt in prompts:
            values, ids = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1).sort(descending=True)
            found.append(dict(zip(ids.tolist(), values.tolist(), strict=True)))
    return found


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """In the context transformers shows no progress, and says nothing of what is deprecated in it."""
    from transformers.utils import logging

    before, shows = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if shows:
            logging.enable_progress_bar()
