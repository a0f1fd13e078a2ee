"""What deserves a look in the figures of a preview."""

from __future__ import annotations

from collections.abc import Iterator

from rwkv_miss.config import PreviewConfig
from rwkv_miss.data.filling import too_empty
from rwkv_miss.data.fitting import tolerated
from rwkv_miss.previewing.found import Preview

# How many of the tokens that a vocabulary lacks are named.
_NAMED = 5


def warnings_of(found: Preview, config: PreviewConfig) -> Iterator[str]:
    """A sentence for each thing that would end a run before it begins, or that it would warn of, and what to do."""
    now, n = found.now, found.records
    if found.refused:
        more = f"; {found.refused - 1:,} more records would be refused" if found.refused > 1 else ""
        yield f"train would end with this: {found.first_refused}{more}"
    if found.outside:
        size, whose = found.vocabulary
        named = ", ".join(f"{token}" for token in [*found.outside][:_NAMED])
        yield (
            f"train would end before it begins: {sum(found.outside.values()):,} tokens are not in the vocabulary of "
            f"{size:,} ids of {whose}, such as {named}; choose the tokenizer that the model was trained with"
        )
    if found.without_loss > tolerated(n):
        yield f"{found.without_loss:,} of {n:,} records have no token that carries loss: nothing is learned from them"
    lost = now.truncated + now.dropped - found.without_loss
    if now.lost_tokens and lost > tolerated(n):
        ends = 2 * (now.truncated + now.dropped) > n and not config.allow_dropping
        yield (
            f"{'train would end before it begins: ' if ends else ''}of {n:,} records, {now.truncated:,} lose their "
            f"ends to ctx_len {now.ctx_len} and {now.dropped:,} have nothing left to learn, with {now.lost_tokens:,} "
            f"of {found.loss_tokens:,} loss tokens; 99 % of the records have at most {found.most:,} tokens"
        )
    if said := too_empty(found.fill, found.packing):
        yield said
