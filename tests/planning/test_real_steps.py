"""The plan beside what real steps take: tensors on a CPU, a process's memory, and figures of a GPU."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from rwkv_miss.adapters.inject import inject, trained_parameters
from rwkv_miss.benchmarks.memory import MODEL
from rwkv_miss.config import AdapterConfig, ModelConfig, PlanConfig
from rwkv_miss.model.init import init_weights, new_config
from rwkv_miss.model.load import build_model
from rwkv_miss.model.log_probs import batch_log_probs
from rwkv_miss.model.recognise import parameter_shapes
from rwkv_miss.planning import step
from rwkv_miss.planning.live import Live
from rwkv_miss.planning.memory import memory
from rwkv_miss.planning.shapes import SHAPES, Base, find_base
from rwkv_miss.planning.step import step_phases
from tests.processes import run_process
from tests.training.runs import as_arguments, small_config

MISS = {"adapter": AdapterConfig(r=8)}


def base_of(sizes: ModelConfig, dtype: torch.dtype = torch.float32) -> Base:
    shapes = parameter_shapes(sizes)
    return Base({k: torch.empty(s, dtype=dtype, device="meta") for k, s in shapes.items()}, sizes.n_layer, dtype)


def real_step(sizes: ModelConfig, config: PlanConfig, dtype: torch.dtype) -> int:
    """The most bytes of tensors alive in the second of two steps of AdamW on real values, weights included."""
    weights = {key: x.to(dtype) for key, x in init_weights(sizes, seed=0).items()}
    model = build_model(weights, "base", dtype, "cpu", "cpu").train()
    model.gradient_checkpointing = config.gradient_checkpointing
    inject(model, config.adapter, masters=weights)
    rng = torch.Generator().manual_seed(0)
    shape = config.batch_size, config.ctx_len + 1
    with Live() as live:
        optimizer = torch.optim.AdamW(trained_parameters(model).values())
        for _ in range(2):
            ids = torch.randint(sizes.vocab_size, shape, generator=rng)
            starts = torch.zeros(shape[0], config.ctx_len, dtype=torch.bool)
            batch = {"tokens": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous(), "seq_start": starts}
            loss = -batch_log_probs(model, batch, None, config.chunk_len)[0]
            optimizer.zero_grad()
            loss.backward()
            del loss
            optimizer.step()
    return live.peak + sum(p.nbytes for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "dtype", "settings"),
    [
        (7, torch.float32, {"adapter": AdapterConfig(r=64, dropout=0.1)}),
        (6, torch.bfloat16, MISS | {"gradient_checkpointing": True}),
        (6, torch.float32, {"adapter": AdapterConfig(method="state")}),
        (7, torch.bfloat16, {"adapter": AdapterConfig(method="full")}),
        (6, torch.float32, {"adapter": AdapterConfig(method="full"), "gradient_checkpointing": True}),
        (7, torch.float32, {"adapter": AdapterConfig(method="miss+state", r=8), "chunk_len": 40}),
        (7, torch.float32, {"adapter": AdapterConfig(r=8, target_modules=["blocks.2.att.key", "3.ffn.value"])}),
    ],
)
def test_a_real_step(version, dtype, settings):
    """What the plan does not see is memory within an operation, such as a copy that a kernel makes."""
    sizes = new_config(version, 5, 128, 512, 64)
    config = PlanConfig(shape="test", batch_size=2, ctx_len=100, wkv_backend="cpu", **settings)
    planned = memory(base_of(sizes, dtype), config).tensors
    assert planned == pytest.approx(real_step(sizes, config, dtype), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings", "tolerance"),
    [("miss", {}, 1e-3), ("full", {"gradient_checkpointing": True}, 1e-3), ("miss", {"chunk_len": 4}, 0.05)],
)
def test_short_rows_and_few_layers_tell_of_long_ones_and_many(method, settings, tolerance, monkeypatch):
    base = base_of(new_config(7, 4, 64, 4096))
    config = PlanConfig(shape="test", batch_size=2, ctx_len=20, adapter=AdapterConfig(method, r=8), **settings)
    told = step_phases(base, config, keeps_gradients=False)
    monkeypatch.setattr(step, "_LAYERS", (4,))
    monkeypatch.setattr(step, "_CHUNKS", (5,))
    run = step_phases(base, config, keeps_gradients=False)
    for phase, held in run.items():
        assert sum(told[phase].values()) == pytest.approx(sum(held.values()), rel=tolerance), phase


# Rows of MiSS with r = 32 in bf16, and the peak in GiB that a forward and a backward pass had on an H100
# (docs/results.md) with the scalar kernels, of PyTorch's tensors.
H100 = [("0.4b", 8, 1024, 13.9), ("1.5b", 2, 4096, 28.8), ("2.9b", 4, 1024, 27.3)]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "batch_size", "ctx_len", "measured"), H100)
def test_figures_of_a_gpu(shape, batch_size, ctx_len, measured):
    rows = {"batch_size": batch_size, "ctx_len": ctx_len, "wkv_backend": "cuda_scalar"}
    config = PlanConfig(shape=shape, adapter=AdapterConfig(r=32), **rows)
    assert memory(find_base(config), config).tensors / 2**30 == pytest.approx(measured, rel=0.1)


def resident(checkpointing: bool, length: int, chunk_len: int | None) -> int:
    """By how many bytes a process's memory rises in a step. Each tensor has pages of its own, which go back to the
    system when it is freed; in glibc's heap they would stay for a while."""
    step = f"step_bytes(1, {checkpointing}, {length}, {chunk_len}, 0)"
    code = f"from rwkv_miss.benchmarks.memory import step_bytes; print({step})"
    result = run_process([sys.executable, "-c", code], 120, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "16384"})
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "length", "chunk_len"), [(False, 8192, None), (True, 16384, None)])
def test_a_process(checkpointing, length, chunk_len):
    """What a process holds in a step beyond weights and gradients, as the system counts it."""
    config = PlanConfig(
        shape="test",
        batch_size=1,
        ctx_len=length,
        chunk_len=chunk_len,
        gradient_checkpointing=checkpointing,
        wkv_backend="cpu",
        adapter=AdapterConfig(r=16),
    )
    phases = step_phases(base_of(MODEL), config, keeps_gradients=True)
    planned = max(held["activations"] + held["logits"] for held in phases.values())
    assert planned == pytest.approx(resident(checkpointing, length, chunk_len), rel=0.1)


ALIVE = """
import sys
from rwkv_miss.cli import main
from rwkv_miss.planning.live import Live
with Live() as live:
    status = main(sys.argv[1:])
print("alive", live.peak)
sys.exit(status)
"""


@pytest.mark.slow
def test_a_run_under_deepspeed(make_base, tmp_path):
    """Every tensor that a run makes, DeepSpeed's buffers included."""
    base = make_base(n_layer=4, n_embd=256, vocab_size=256)
    data = tmp_path / "data.txt"
    data.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    settings = small_config(base, data, tmp_path / "out")
    settings.strategy, settings.max_steps, settings.adapter = "deepspeed_stage_2", 2, AdapterConfig(method="full")
    result = run_process([sys.executable, "-c", ALIVE, "train", *as_arguments(settings)], timeout=120)
    assert result.returncode == 0, result.stderr
    config = PlanConfig(**vars(settings) | {"wkv_backend": "cpu"})
    planned = memory(find_base(config), config).tensors
    assert planned == pytest.approx(int(result.stdout.split("alive")[1]), rel=0.1)


def parts(**settings) -> dict[str, tuple[float, float]]:
    config = PlanConfig(shape="0.1b", ctx_len=64, **settings)
    return {name: sizes for name, *sizes in memory(find_base(config), config).rows}


@pytest.mark.slow
def test_what_each_strategy_shares():
    full = {"adapter": AdapterConfig(method="full"), "gradient_checkpointing": True}
    alone = parts(**full)
    state, weights = "optimizer state", "weights, trained (fp32)"
    for stage, strategy in enumerate(("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")):
        shared = parts(**full, devices=4, strategy=strategy)
        assert shared[state][0] == pytest.approx(alone[state][0] / (4 if stage else 1), rel=1e-3)
        assert shared[weights][0] == alone[weights][0] / (4 if stage == 3 else 1)
    offloaded = parts(**full, devices=2, strategy="deepspeed_stage_2", offload="optimizer")
    assert offloaded[state][0] == 0 and offloaded[state][1] == pytest.approx(alone[state][0], rel=1e-3)
    everything = parts(**full, devices=2, strategy="deepspeed_stage_3", offload="all")
    assert everything[weights] == [0, alone[weights][0]]
    assert everything["weights, gathered (at most)"][0] == alone[weights][0]


@pytest.mark.slow
def test_a_cast_base_is_read_whole_by_each_process():
    loaded = "what is loaded, on its way to the GPU"
    assert parts(**MISS)[loaded][1] < 0.01 * parts(**MISS, precision="fp32", devices=2, strategy="ddp")[loaded][1]


def test_accumulated_gradients_stay():
    base = base_of(new_config(7, 2, 64, 64))
    config = PlanConfig(shape="test", ctx_len=16, **MISS)
    freed, kept = (step_phases(base, config, keeps_gradients=keeps)["head"]["gradients"] for keeps in (False, True))
    assert freed == 0 and kept == 4 * 8 * (4 * 64 + 256 + 64) * 2


@pytest.mark.parametrize(("version", "name"), [(version, name) for version, names in SHAPES.items() for name in names])
def test_a_released_model_has_the_size_that_it_is_called(version, name):
    """Names cut digits off (0.19 is 0.1b), but for two that are rounded."""
    parameters = sum(x.numel() for x in find_base(PlanConfig(shape=name, version=version)).tensors.values()) / 1e9
    digits = 10 ** len(name.removesuffix("b").partition(".")[2])
    called = float(name.removesuffix("b"))
    assert int(parameters * digits) / digits == called or parameters == pytest.approx(called, rel=0.025)


@pytest.mark.slow
@pytest.mark.parametrize(("version", "shape", "paper"), [(7, "3b", 47.2), (6, "7b", 88.1)])
def test_the_paper_counts_as_many_trained_parameters(version, shape, paper):
    """arXiv 2409.15371, MiSS with r = 64 on RWKV."""
    config = PlanConfig(shape=shape, version=version, ctx_len=8, batch_size=1)
    assert round(memory(find_base(config), config).trained / 1e6, 1) == paper
