"""Every combination of version, method and row layout trains, with the same losses where they must be equal in theory,
and its adapter merges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rwkv_miss import load_adapter, load_model, merge
from rwkv_miss.config import AdapterConfig
from rwkv_miss.model.initial_state import load_initial_state
from tests.training.runs import losses, quiet_train, small_config

METHODS = ("miss", "state", "miss+state", "full")
# Documents of 28 to 170 tokens: none is cut.
LAYOUTS = {
    "padded": {"packing": False},
    "packed": {"packing": True},
    "infctx exact": {"packing": True, "chunk_len": 48},
    "infctx truncated": {"packing": True, "chunk_len": 48, "bptt_chunks": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_layouts_train_alike_and_what_they_leave_merges(any_base, data, tmp_path, method):
    """One step is all of the data, so that every layout takes the same steps."""
    lr = {"state": 0.3, "full": 1e-3}.get(method, 1e-2)
    config = replace(
        small_config(any_base, data, tmp_path), adapter=AdapterConfig(method, r=4), batch_size=29, lr=lr, max_steps=3
    )
    config = replace(config, ctx_len=192, lr_state=0.3 if "+state" in method else None)
    found = {}
    for name, layout in LAYOUTS.items():
        run = replace(config, out=str(tmp_path / name.replace(" ", "-")), **layout)
        quiet_train(run)
        found[name] = losses(run.out)
        assert len(found[name]) == 3 and found[name][2] < found[name][0], name
        assert_merges(any_base, Path(run.out) / "adapter", tmp_path, method)

    truncated = found.pop("infctx truncated")
    for name, values in found.items():
        assert values == pytest.approx(found["padded"], rel=2e-5), name
    # The gradient is truncated, the loss is not: the first loss is that of the other layouts, later ones differ.
    assert truncated[0] == pytest.approx(found["padded"][0], rel=1e-6)
    assert truncated != pytest.approx(found["padded"], rel=2e-5)


@torch.no_grad()
def assert_merges(base: Path, adapter: Path, folder: Path, method: str) -> None:
    tokens = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(2))
    expected = load_adapter(load_model(base), adapter)(tokens)[0]
    assert (expected - load_model(base)(tokens)[0]).abs().max() > 1e-3
    merge(base, adapter, folder / "merged.pth", overwrite=True)
    torch.testing.assert_close(load_model(folder / "merged.pth")(tokens)[0], expected, rtol=0, atol=1e-5)
    if method == "state":  # the state file alone is enough
        merge(base, adapter, folder / "state.pth", state_only=True, overwrite=True)
        model = load_model(base)
        load_initial_state(model, folder / "state.pth")
        torch.testing.assert_close(model(tokens)[0], expected, rtol=0, atol=1e-5)
