from __future__ import annotations

from rwkv_miss.config import Data, DataOptions


def run(data: Data, tokenizer: str, out: str, options: DataOptions) -> int:
    """Write data as a binidx: token ids that training memory-maps. Training on it learns prompts as well as answers.

    Args:
        data: Files or folders, as for train but without weights.
        tokenizer: world, bytes, or the path of a Hugging Face tokenizer.json.
        out: PREFIX of the files to write, PREFIX.bin and PREFIX.idx.
    """
    from rwkv_miss.data.corpus import records_to_binidx
    from rwkv_miss.data.sources import data_name
    from rwkv_miss.data.templates import settled
    from rwkv_miss.data.tokenizers import load_tokenizer

    written = records_to_binidx(data, out, load_tokenizer(tokenizer), settled(options))
    print(f"{out}.bin, {out}.idx: {written.documents:,} documents, {written.tokens:,} tokens")
    if written.with_prompts:
        print(
            f"documents with prompts: {written.with_prompts:,}; a binidx does not mark the answers, so training "
            f"on it learns the prompts too. Train on {data_name(data)} itself to learn the answers alone"
        )
    return 0
