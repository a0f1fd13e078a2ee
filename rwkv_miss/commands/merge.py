from __future__ import annotations

from rich.console import Console
from rich.table import Table

from rwkv_miss.commands.model import Dtype


def run(
    base: str,
    adapter: list[str] | str,
    out: str,
    dtype: Dtype | None = None,
    state_only: bool = False,
    overwrite: bool = False,
    weights: list[float] | None = None,
) -> int:
    """Write base + adapter as one .pth that any RWKV runtime reads, and check it.

    Args:
        base: The checkpoint that the adapter was trained on.
        adapter: The adapter's folder, or the folder of a run, whose adapter is used; several as [A,B].
        out: The file to write, ending in .pth.
        dtype: Dtype of every tensor written, except states (always fp32); the base's own when not given.
        state_only: Write only the learned state, as a file that runtimes load beside the base.
        overwrite: Replace the file if it is there.
        weights: What each adapter counts, as [0.7,0.3], so that W + 0.7 dW_A + 0.3 dW_B is written; 1 when not given.
    """
    from rwkv_miss.adapters.files import adapter_folder, read_facts
    from rwkv_miss.merging import merge
    from rwkv_miss.progress import show_progress

    with show_progress("tensors written and read back") as on_tensor:
        report = merge(base, adapter, out, dtype, state_only, overwrite, on_tensor, weights)
    table = Table("trained", "merged", "|dW| mean", "lost by the cast: mean", "most", title=f"{report.out}")
    for kind, layers in report.kinds().items():
        losses = [layer.cast_loss for layer in layers]
        norm = sum(layer.delta_norm for layer in layers) / len(layers)
        table.add_row(kind, str(len(layers)), f"{norm:.4g}", f"{sum(losses) / len(losses):.2%}", f"{max(losses):.2%}")
    console = Console(markup=False)
    console.print(table)
    console.print(
        f"{report.dtype}; logits of the written file differ from base + adapter by {report.logits_error:.1e} of their "
        f"size; the adapter changes the base's by {report.logits_effect:.1e}",
        highlight=False,
        soft_wrap=True,
    )
    folders = [adapter] if isinstance(adapter, str) else adapter
    for quant in {facts["quant"] for facts in map(read_facts, map(adapter_folder, folders)) if facts.get("quant")}:
        console.print(
            f"an adapter was trained on the base in {quant}; the file has the base's own weights, so its losses are "
            "not quite those of the run",
            highlight=False,
            soft_wrap=True,
        )
    return 0
