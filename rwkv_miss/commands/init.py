from __future__ import annotations

from rwkv_miss.commands.model import Dtype


def run(
    n_layer: int,
    n_embd: int,
    vocab_size: int,
    out: str,
    version: int | str = 7,
    head_size: int = 64,
    dim_ffn: int | None = None,
    low_rank: dict[str, int] | None = None,
    seed: int = 0,
    dtype: Dtype = "bf16",
) -> int:
    """Write a new model with BlinkDL's initial weights, to train from scratch.

    Args:
        n_layer: Number of layers.
        n_embd: Width, a multiple of head_size.
        vocab_size: Number of token ids: 65536 for the World tokenizer, 256 for bytes.
        out: The file to write, ending in .pth.
        version: Version of RWKV: 6 or 7.
        head_size: Channels in a head.
        dim_ffn: Width inside the channel mix; 4 n_embd (RWKV-7) or 3.5 n_embd rounded down to a multiple of
            32 (RWKV-6) when not given.
        low_rank: Widths of low-rank matrices that replace BlinkDL's, such as {w: 64}. RWKV-7 has w, a, v and g,
            RWKV-6 maa and decay.
        seed: Seed of the random matrices, at least 0 and below 2^64.
        dtype: Dtype of every tensor written.
    """
    from rwkv_miss.model.init import new_config, write_initial

    config = new_config(version, n_layer, n_embd, vocab_size, head_size, dim_ffn, low_rank)
    parameters = write_initial(config, seed, out, dtype)
    print(f"{out}: RWKV-{version}, {n_layer} layers of {n_embd}, vocabulary {vocab_size:,}: {parameters:,} parameters")
    return 0
