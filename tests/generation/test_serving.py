"""Members of one batch, each with an adapter of its own: what each gets is what the model with that adapter gives."""

from __future__ import annotations

import random

import pytest
import torch

from rwkv_miss import AdapterConfig, inject, load_adapter, load_model, save_adapter
from rwkv_miss.adapters.inject import trained_parameters
from rwkv_miss.data.tokenizers import END, Tokenizer
from rwkv_miss.errors import UserError
from rwkv_miss.generation.engine import Engine, Piece
from rwkv_miss.generation.sampling import Sampling

LETTERS = Tokenizer("letters", 64, lambda text: [ord(c) - 0x100 for c in text], lambda ids: letters(ids))
CONFIGS = {
    "miss4": AdapterConfig(r=4),
    "miss5": AdapterConfig(r=5),  # does not divide the 32 inputs
    "another miss4": AdapterConfig(r=4, target_modules=["att.key", "ffn.value"]),
    "third miss4": AdapterConfig(r=4, layers_to_transform=[1]),
    "ranks": AdapterConfig(r=4, rank_pattern={"ffn[.].*": 8}),
    "mini": AdapterConfig("mini", r=5, options={"mini_r": 8}),
    "lora": AdapterConfig("lora", r=4),
    "lora3": AdapterConfig("lora", r=3, options={"alpha": 5.0, "rank_stabilized": True}),
    "pissa": AdapterConfig("pissa", r=2),
    "methods": AdapterConfig("miss", r=4, method_pattern={"att[.]key": "lora"}),
    "state": AdapterConfig("state"),
    "miss+state": AdapterConfig("miss+state", r=4, target_modules=["att.value"]),
}


def letters(ids: list[int]) -> str:
    return "".join(chr(0x100 + i) for i in ids if i != END)


def prompt_of(n_tokens: int, seed: int) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(1, 64) for i in range(n_tokens)]


@pytest.fixture
def save(either_base, tmp_path):
    """`save(name, config)` writes an adapter of random tensors; its folder."""

    def write(name: str, config: AdapterConfig):
        torch.manual_seed(len(name))
        model = inject(load_model(either_base), config)
        rng = torch.Generator().manual_seed(len(name) * 100 + ord(name[-1]))
        for p in trained_parameters(model).values():
            p.data += 0.2 * torch.randn(p.shape, generator=rng)
        save_adapter(model, tmp_path / name)
        return tmp_path / name

    return write


def with_adapter(base, folder=None):
    """The model in float64, by the way that runs and evaluations take."""
    model = load_model(base, torch.float64)
    model = load_adapter(model, folder) if folder else model
    model.head.weight.data[END] = 0
    return model.eval()


@torch.no_grad()
def greedy(model, prompt: list[int], n_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n_tokens):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return ids[len(prompt) :]


def ids_of(pieces: list[Piece], member: int) -> list[int]:
    return [token for piece in pieces if piece.member == member for token in piece.ids]


@pytest.mark.parametrize("max_positions", [None, 40])
def test_each_member_gets_what_its_adapter_gives_alone(either_base, save, max_positions):
    folders = {name: save(name, config) for name, config in CONFIGS.items()}
    engine = Engine(with_adapter(either_base), LETTERS, max_positions)
    for name, folder in folders.items():
        engine.adapters.add(name, folder)
    assert engine.adapters.names() == list(folders)
    names = [None, *folders, None, "lora", "miss4"]
    pieces = []
    for i, name in enumerate(names):
        engine.add(prompt_of(1 + 9 * i % 60, i), Sampling(max_tokens=6 + i), adapter=name)
        if i % 4 == 0:
            pieces += engine.step()
    pieces += engine
    found = {}
    for name in dict.fromkeys(names):
        model = with_adapter(either_base, folders.get(name))
        for i in (i for i, other in enumerate(names) if other == name):
            expected = greedy(model, prompt_of(1 + 9 * i % 60, i), 6 + i)
            assert ids_of(pieces, i) == expected, name
            found[name] = greedy(model, prompt_of(20, 0), 12)
    assert len(set(map(tuple, found.values()))) >= len(found) - 1  # the adapters do matter


def test_names(either_base, save):
    engine = Engine(with_adapter(either_base), LETTERS)
    with pytest.raises(UserError, match="no adapter whose name is 'a'; there are: there are none"):
        engine.add([1], adapter="a")
