"""Fixtures that several test folders share."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file
from torch import Tensor

from rwkv_miss.config import ModelConfig
from rwkv_miss.files import cache_folder, remove
from rwkv_miss.model.rwkv6 import RWKV6
from tests.processes import Start, processes

# No test looks at the time that an example takes: beside others that is anything.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The tests' tensors are small: a second thread costs more than it gains."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk():
    """What these processes write need not outlive a loss of power. The processes that tests start do wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def no_rows_left(tmp_path_factory):
    """Tests share the user's cache, since compiling takes long. The rows of the files that they made are removed."""
    yield
    ours = str(tmp_path_factory.getbasetemp())
    for path in (cache_folder() / "data").glob("*/entry.json"):
        with suppress(OSError):  # of another session, which removes it
            if ours in path.read_text():
                remove(path.parent)


@pytest.fixture
def start_process() -> Iterator[Start]:
    """`start_process(command, **options of Popen)`; what is left of it at the end of the test is killed."""
    with processes() as start:
        yield start


@pytest.fixture
def recomputed_blocks(monkeypatch) -> list:
    """Grows by an element for each block that a forward pass leaves to be computed again (gradient checkpointing)."""
    from rwkv_miss.model import base

    found: list = []
    original = base.checkpoint
    monkeypatch.setattr(base, "checkpoint", lambda f, *x, **more: (found.append(f), original(f, *x, **more))[1])
    return found


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of real models and data, which is not shipped."""
    folder = Path(__file__).parents[2] / "shared" / "reference"
    if not folder.is_dir():
        pytest.skip(f"no reference data in {folder}")
    return folder


@pytest.fixture
def tiny_model(reference: Path) -> Path:
    """A trained RWKV-7 of 834K parameters: 12 layers, n_embd 64, vocabulary of 256 bytes, fp32."""
    return reference / "models" / "tiny-rwkv7-834K.pth"


@pytest.fixture(scope="session")
def random_weights() -> Callable[..., dict[str, Tensor]]:
    """`random_weights(n_layer=3, n_embd=32, head_size=16, vocab_size=64, dtype=torch.float32, layer0_v=False,
    seed=0)`: an RWKV-7 state dict in which every tensor is random and every low-rank width another."""
    return _random_weights


@pytest.fixture(scope="session")
def random_weights6() -> dict[str, Tensor]:
    """An RWKV-6 state dict, fp32: 3 layers, n_embd 32, 2 heads of 16, vocabulary of 64; every tensor random."""
    config = ModelConfig(6, 3, 32, 2, 16, 96, 64, {"maa": 4, "decay": 6})
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in RWKV6(config).named_parameters()}
    rng = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        is_norm = ".ln" in name or name.startswith("ln_out")
        std = 0.2 if is_norm else 1 / math.sqrt(shape[-1]) if name.endswith(".weight") else 0.3
        mean = 1.0 if is_norm and name.endswith(".weight") else 0.0
        weights[name] = mean + std * torch.randn(shape, generator=rng)
    return weights


@pytest.fixture(params=[6, 7])
def either_base(request, tmp_path, random_weights6) -> Path:
    """A random base of each version in turn: 3 layers, n_embd 32, 2 heads of 16, vocabulary of 64, fp32."""
    path = tmp_path / f"base{request.param}.pth"
    torch.save(random_weights6 if request.param == 6 else _random_weights(), path)
    return path


@pytest.fixture
def make_base(tmp_path: Path) -> Callable[..., Path]:
    """`make_base(name="base.pth", **sizes)` writes `random_weights(**sizes)` to a .pth or .st file."""

    def make(name: str = "base.pth", **sizes) -> Path:
        path = tmp_path / name
        weights = _random_weights(**sizes)
        torch.save(weights, path) if path.suffix == ".pth" else save_file(weights, path)
        return path

    return make


@pytest.fixture(scope="session")
def rwkv_logits() -> Callable[..., Tensor]:
    """`rwkv_logits(path, ids, wkv=None)`: the `rwkv` package's logits (T, V) of an RWKV-7 .pth, in fp32 on the CPU;
    wkv: the layers' WKV states that it begins from, instead of zeros."""
    with pytest.MonkeyPatch.context() as patch:  # the package reads these once, when it is imported
        patch.setenv("RWKV_V7_ON", "1")
        patch.setenv("RWKV_JIT_ON", "0")
        rwkv = pytest.importorskip("rwkv.model")

    def logits(path: Path, ids: list[int], wkv: list[Tensor] | None = None) -> Tensor:
        model = rwkv.RWKV(model=str(path).removesuffix(".pth"), strategy="cpu fp32")
        state = model.generate_zero_state()  # of each layer: shift, WKV state, shift
        if wkv is not None:
            state[1::3] = wkv
        return model.forward(ids, state, full_output=True)[0]

    return logits


@pytest.fixture(scope="session")
def full_disk() -> Callable[[int], AbstractContextManager]:
    """`with full_disk(n):` no file may grow beyond n bytes (Python turns the signal for this into an OSError)."""

    @contextmanager
    def limit(n_bytes: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


def _random_weights(
    n_layer: int = 3,
    n_embd: int = 32,
    head_size: int = 16,
    vocab_size: int = 64,
    dtype: torch.dtype = torch.float32,
    layer0_v: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    C, V, F = n_embd, vocab_size, 4 * n_embd
    weights = {}

    def normal(key: str, *shape: int, std: float = 1.0, mean: float = 0.0) -> None:
        weights[key] = (mean + std * torch.randn(shape, generator=rng)).to(dtype)

    def matrix(key: str, rows: int, cols: int) -> None:
        normal(key, rows, cols, std=1 / math.sqrt(cols))

    def norm(key: str) -> None:
        normal(f"{key}.weight", C, std=0.2, mean=1.0)
        normal(f"{key}.bias", C, std=0.2)

    normal("emb.weight", V, C)
    for i in range(n_layer):
        block = f"blocks.{i}"
        for name in ("ln0", "ln1", "ln2") if i == 0 else ("ln1", "ln2"):
            norm(f"{block}.{name}")
        for kind in "rwkvag":
            normal(f"{block}.att.x_{kind}", 1, 1, C, std=0.3, mean=0.5)
        for kind, rank in {"w": 5, "a": 6, "v": 3, "g": 9}.items():
            if kind == "v" and i == 0 and not layer0_v:
                continue
            if kind != "g":
                normal(f"{block}.att.{kind}0", 1, 1, C)
            normal(f"{block}.att.{kind}1", C, rank, std=1 / math.sqrt(C))
            normal(f"{block}.att.{kind}2", rank, C, std=1 / math.sqrt(rank))
        normal(f"{block}.att.k_k", 1, 1, C, std=0.2, mean=0.8)
        normal(f"{block}.att.k_a", 1, 1, C, std=0.2, mean=1.0)
        normal(f"{block}.att.r_k", C // head_size, head_size, std=0.3)
        for name in ("receptance", "key", "value", "output"):
            matrix(f"{block}.att.{name}.weight", C, C)
        norm(f"{block}.att.ln_x")
        normal(f"{block}.ffn.x_k", 1, 1, C, std=0.3, mean=0.5)
        matrix(f"{block}.ffn.key.weight", F, C)
        matrix(f"{block}.ffn.value.weight", C, F)
    norm("ln_out")
    matrix("head.weight", V, C)
    return weights
