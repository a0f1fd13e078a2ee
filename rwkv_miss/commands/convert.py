from __future__ import annotations


def run(base: str, adapter: str, out: str, to: str | None = None, origin: str | None = None, ours: bool = False) -> int:
    """Write an adapter of another program, or as another method, as a folder that HF PEFT reads too.

    Args:
        base: The checkpoint that the adapter was trained on.
        adapter: A .pth of RWKV-PEFT's whose keys end in .disha or .bone, or an adapter folder, ours or HF PEFT's.
        out: The folder to write.
        to: The method whose tensors to write, where they can say exactly the same; the adapter's own when not given.
        origin: Who trained a .pth of three-dimensional blocks: rwkv-peft (a block for each group of inputs) or peft
            (for each group of outputs). Its shapes do not always tell, so that it is asked for.
        ours: Write what HF PEFT cannot hold too, as a folder that rwkv-miss alone reads.
    """
    from rwkv_miss.adapters.converting import convert
    from rwkv_miss.adapters.inject import installed

    adapter_now = installed(convert(base, adapter, out, to, origin, ours))
    print(
        f"{out}: {adapter_now.config.method}, r {adapter_now.config.r}, beside {len(adapter_now.plan.linears)} linears"
    )
    return 0
