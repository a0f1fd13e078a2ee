"""The count of a step's kernels and bytes beside counts by hand and torch's profiler."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rwkv_miss.adapters.inject import inject
from rwkv_miss.benchmarks.launches import layer_rows
from rwkv_miss.config import AdapterConfig, PlanConfig
from rwkv_miss.model.init import init_weights, new_config
from rwkv_miss.model.recognise import parameter_shapes
from rwkv_miss.model.versions import MODELS
from rwkv_miss.planning.launches import Trace, fused, trace_step
from rwkv_miss.planning.shapes import Base


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def moved(operations) -> list[tuple[str, int]]:
    return [(x.name, x.bytes) for x in operations]


def test_a_function_counted_by_hand():
    """Of fp32: x and each result of its shape are 4 x 8, 128 bytes; w is 8 x 8, 256; s is 8, 32."""
    x, w, s = meta(4, 8), meta(8, 8), meta(8)
    with Trace() as trace:
        y = torch.tanh(x @ w)
        z = (y * s.expand(4, 8)).view(32)
        z.add_(1)
        torch.empty_like(z).copy_(z)
    assert moved(trace.operations) == [
        ("mm", 128 + 256 + 128),
        ("tanh", 128 + 128),
        ("mul", 128 + 32 + 128),
        ("add_", 128 + 128),
        ("copy_", 128 + 128),
    ]
    assert moved(fused(trace.operations)) == [("mm", 512), ("passes at depth 1", 128 + 32 + 128)]


def test_parts_of_a_tensor_are_counted_once_where_one_kernel_reads_them():
    with Trace() as trace:
        y = meta(4, 8) @ meta(8, 8)
        torch.cat([y[:, 6:], y[:, :6]], 1) + y
    assert moved(trace.operations)[1:] == [("cat", 32 + 96 + 128), ("add", 3 * 128)]
    assert moved(fused(trace.operations))[1:] == [("passes at depth 1", 128 + 128)]


def test_what_is_computed_again_and_what_is_written():
    """a and b are made of y alone; c is made of two tensors; all are read once more after the second product."""
    with Trace() as trace:
        w = meta(8, 8)
        y = meta(4, 8) @ w
        a = torch.tanh(y)
        b = torch.sigmoid(a)
        c = b + meta(4, 8)
        z = b @ w
        z * a * c
    names = Counter(x.name for x in trace.operations)
    assert names == {"mm": 2, "tanh": 1, "sigmoid": 1, "add": 1, "mul": 2}
    first, second = [x for x in fused(trace.operations) if x.kind == "passes"]
    assert first.bytes == (128 + 128) + (128 + 128)  # reads y and the other tensor, writes b and c
    assert second.bytes == 128 + 128 + 128 + 128  # reads z, y and c, writes the result


def tiny(version: int) -> torch.nn.Module:
    sizes = new_config(version, 3, 64, 96, 32)
    model = MODELS[version](sizes, "cpu")
    model.load_state_dict(init_weights(sizes, seed=0))
    return inject(model.train(), AdapterConfig(r=8))


def step(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    model(tokens)[0].sum().backward()


@pytest.mark.parametrize("version", [6, 7])
def test_torchs_profiler_counts_the_same_operations(version):
    """On a CPU, for every name that is counted; on the meta device they are the same again."""
    tokens = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(0))
    model, shapes_alone, no_values = tiny(version), tiny(version).to("meta"), tokens.to("meta")
    with Trace() as on_cpu, profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(model, tokens)
    with Trace() as on_meta:
        step(shapes_alone, no_values)
    counted = Counter(x.name for x in on_cpu.operations)
    assert Counter(x.name for x in on_meta.operations) == counted and counted["mm"] > 50

    def name(event) -> str:
        return event.name.split("::")[-1]

    def is_within(event) -> bool:
        """An operation that one of those that are counted calls."""
        return event.cpu_parent is not None and (name(event.cpu_parent) in counted or is_within(event.cpu_parent))

    found = Counter(name(x) for x in profiler.events() if name(x) in counted and not is_within(x))
    assert found == counted


@pytest.mark.slow
@pytest.mark.parametrize("version", [6, 7])
def test_every_layer_after_the_first_adds_the_same(version):
    sizes = new_config(version, 4, 128, 512, 64)
    shapes = parameter_shapes(sizes)
    tensors = {key: torch.empty(shape, dtype=torch.bfloat16, device="meta") for key, shape in shapes.items()}
    base = Base(tensors, 4, torch.bfloat16)
    config = PlanConfig(shape="test", batch_size=2, ctx_len=64, adapter=AdapterConfig(r=8))
    *_, row = layer_rows(base, config, "tiny")
    for prefix, of in (("", lambda x: x), ("least_", fused)):
        two, four = (of(trace_step(base.with_layers(n), config)) for n in (2, 4))
        assert sum(x.launches for x in four) - sum(x.launches for x in two) == 2 * row[f"{prefix}launches"]
        assert sum(x.bytes for x in four) - sum(x.bytes for x in two) == pytest.approx(2 * 128e3 * row[f"{prefix}kb"])
    assert 20 < row["least_launches"] < row["launches"] and 0 < row["least_kb"] < row["kb"]
    assert 0 < row["kept_checkpointing_kb"] < row["kept_kb"]
