"""What can be tested with CUDA tensors on a machine without a GPU: torch's fake tensors have a device, a shape and a
dtype, but no memory. Where torch was built without CUDA they have no autograd either, which is left to on_stub.py."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from rwkv_miss.errors import UserError
from rwkv_miss.ops.cuda.wkv import SAVE_EVERY
from tests.ops.cases import WKV6, odd_starts


@pytest.fixture
def fake():
    """`fake(x, device)`: a fake tensor like x on that device."""
    with FakeTensorMode():
        yield lambda x, device="cuda:1": torch.empty(x.shape, dtype=x.dtype, device=device)


@pytest.fixture
def case(wkv):
    """Inputs, a state and seq_start as real tensors, made before the fake mode begins."""
    inputs, state = wkv.make_inputs(2 * SAVE_EVERY + 1, 16, torch.bfloat16, batch=2, n_head=3)
    return inputs, state, odd_starts(2 * SAVE_EVERY + 1)


def kinds(tensors) -> list[tuple]:
    """All that fake tensors have."""
    return [(x.shape, x.dtype, x.device.type, x.device.index) for x in tensors]


def test_results_have_the_shapes_and_the_device_of_the_inputs(wkv, case, fake):
    forward, backward = (getattr(torch.ops.rwkv_miss, f"{wkv.name}_cuda{part}") for part in ("", "_backward"))
    inputs, state, start = [fake(x) for x in case[0]], fake(case[1]), fake(case[2])
    y, last, states, *saved = forward(*inputs, state, start, True)
    assert kinds([y, last]) == kinds([inputs[0], state])
    assert kinds([states]) == [((2, 3, 3, 16, 16), torch.float32, "cuda", 1)]
    assert kinds(saved) == ([] if wkv is WKV6 else [(inputs[0].shape, torch.float32, "cuda", 1)])
    assert kinds(backward(*inputs, start, states, *saved, y, last)) == kinds([*inputs, state])
    assert kinds(backward(*inputs, None, states, *saved, None, None)) == kinds([*inputs, state])
    assert [x.numel() for x in forward(*inputs, state, None, False)[2:]] == [0] * (1 + len(saved))


def test_the_graph_of_a_compiler_has_one_node_for_each_direction(wkv, case, fake):
    forward, backward = (getattr(torch.ops.rwkv_miss, f"{wkv.name}_cuda{part}") for part in ("", "_backward"))

    def both(*tensors):
        *inputs, state, start = tensors
        y, last, *saved = forward(*inputs, state, start, True)
        return backward(*inputs, start, *saved, y, last)

    graph = make_fx(both)(*map(fake, case[0]), fake(case[1]), fake(case[2])).graph
    ours = [str(node.target) for node in graph.nodes if "rwkv_miss" in str(node.target)]
    assert ours == [f"rwkv_miss.{wkv.name}_cuda.default", f"rwkv_miss.{wkv.name}_cuda_backward.default"]


@pytest.mark.parametrize("name", ["first", "last", "state", "seq_start"])
def test_an_argument_on_another_gpu_is_named(wkv, case, fake, name):
    arguments = dict(zip(wkv.inputs, case[0], strict=True), state=case[1], seq_start=case[2])
    name = {"first": wkv.inputs[0], "last": wkv.inputs[-1]}.get(name, name)
    arguments = {x: fake(y, "cuda:0" if x == name else "cuda:1") for x, y in arguments.items()}
    with pytest.raises(UserError, match=f"{wkv.name}: {name} is .* on cuda:0; expected .* on cuda:1, to go with v"):
        wkv.op(**arguments, backend="reference")
