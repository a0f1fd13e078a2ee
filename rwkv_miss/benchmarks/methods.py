"""Compares what each method that goes beside linears computes with HF PEFT's, on tiny models in fp32."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_miss.adapters.files import CONFIG, WEIGHTS, load_adapter, save_adapter
from rwkv_miss.adapters.inject import inject, installed, trained_parameters
from rwkv_miss.adapters.method import METHODS, LinearMethod, find_methods
from rwkv_miss.benchmarks.common import Table, threads
from rwkv_miss.checkpoint import TensorSpec, read_checkpoint, read_safetensors, write_pth
from rwkv_miss.config import AdapterConfig
from rwkv_miss.errors import UserError
from rwkv_miss.merging.merge import merge
from rwkv_miss.model.init import init_weights, new_config
from rwkv_miss.model.load import load_model

VERSIONS = (6, 7)
_VOCAB_SIZE = 64
_PREFIX = "base_model.model."


def bench_methods(thread_count: int) -> Table:
    """Each method and variant that PEFT has, on a random RWKV of each of `VERSIONS` (2 layers of 32), beside every
    linear, with random adapters.

    Returns:
        A table with a row for each: the largest differences from PEFT's results, each relative to the largest value
        there. forward: of the logits; gradients: of all that is trained; merge: of each merged weight; PEFT_reads_ours:
        of the logits of a PEFT model that opened our folder; we_read_PEFTs: of those of our model that opened a folder
        saved by PEFT.

    Raises:
        UserError: PEFT is not installed.
    """
    try:
        import peft
    except ImportError as e:
        raise UserError(f"bench: methods needs HF PEFT, which cannot be imported ({e}); pip install peft") from None
    rows: list[dict[str, Any]] = []
    with threads(thread_count), torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        for name in METHODS:
            [method] = find_methods(name)
            for variant in method.variants if isinstance(method, LinearMethod) else ():
                for version in VERSIONS:
                    torch.manual_seed(0)
                    base = Path(folder) / f"rwkv{version}.pth"
                    _make(base, version)
                    words = [
                        name,
                        *(option if value is True else f"{option} {value}" for option, value in variant.items()),
                    ]
                    config = AdapterConfig(name, r=8, options=dict(variant))
                    rows.append(
                        {"method": ", ".join(words), "RWKV": version} | _compare(peft, base, config, Path(folder))
                    )
    return Table(f"Methods beside HF PEFT {peft.__version__}'s: the largest relative differences", rows)


def _make(base: Path, version: int) -> None:
    weights = init_weights(new_config(version, 2, 32, _VOCAB_SIZE, head_size=16), seed=0)
    weights = {key: W + 0.1 * torch.randn(W.shape) for key, W in weights.items()}
    write_pth(base, {key: TensorSpec(W.shape, W.dtype) for key, W in weights.items()}, weights.__getitem__)


def _compare(peft: Any, base: Path, config: AdapterConfig, folder: Path) -> dict[str, float]:
    tokens = torch.randint(_VOCAB_SIZE, (2, 13))
    direction = torch.randn(2, 13, _VOCAB_SIZE)
    ours = inject(load_model(base), config).eval()
    trained = trained_parameters(ours)
    for p in trained.values():
        p.data += 0.05 * torch.randn(p.shape)
    save_adapter(ours, folder / "ours")
    fields = json.loads((folder / "ours" / CONFIG).read_text()) | {"inference_mode": False}
    theirs = peft.get_peft_model(load_model(base), peft.PeftConfig.from_peft_type(**fields)).eval()
    peft.set_peft_model_state_dict(theirs, read_safetensors(folder / "ours" / WEIGHTS))
    theirs.save_pretrained(folder / "theirs")

    our_logits, our_gradients = _run(ours, trained, tokens, direction)
    their_parameters = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    their_logits, gradients = _run(theirs, their_parameters, tokens, direction)
    named = peft.get_peft_model_state_dict(theirs, state_dict=gradients)
    # Tensors in a file may have more rows or columns than are trained: they come last.
    their_gradients = [named[_PREFIX + key][tuple(map(slice, g.shape))] for key, g in our_gradients.items()]
    opened = peft.PeftModel.from_pretrained(load_model(base), folder / "ours").eval()
    loaded = load_adapter(load_model(base), folder / "theirs").eval()
    with torch.no_grad():
        reads = _error(opened(tokens)[0], our_logits), _error(loaded(tokens)[0], their_logits)
    merge(base, folder / "ours", folder / "merged.pth", overwrite=True)
    merged, expected = read_checkpoint(folder / "merged.pth"), theirs.merge_and_unload().state_dict()
    weights = [f"{path}.weight" for path in installed(ours).plan.linears]
    return {
        "forward": _error(our_logits, their_logits),
        "gradients": _error(_flat(our_gradients.values()), _flat(their_gradients)),
        "merge": max(_error(merged[key], expected[key]) for key in weights),
        "PEFT_reads_ours": reads[0],
        "we_read_PEFTs": reads[1],
    }


def _run(
    model: nn.Module, trained: Mapping[str, nn.Parameter], tokens: Tensor, direction: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and the gradient of their product with `direction` for each of `trained`."""
    logits = model(tokens)[0]
    gradients = torch.autograd.grad((logits * direction).sum(), list(trained.values()))
    return logits.detach(), dict(zip(trained, gradients, strict=True))


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()
