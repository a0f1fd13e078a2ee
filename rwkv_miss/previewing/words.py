"""The figures of a preview in words, as the terminal and the page have them."""

from __future__ import annotations

from datetime import timedelta

from rwkv_miss.config import PreviewConfig
from rwkv_miss.previewing.found import AtLength, Preview, Repeated, Shown

# How many fields and tokens are named.
_NAMED = 8
LENGTH_COLUMNS = (
    *("ctx_len", "cut", "dropped", "loss tokens lost"),
    *("packed rows", "filled", "unpacked rows", "filled"),
)
"""The heads of the table of context lengths."""


def length_cells(at: AtLength) -> list[str]:
    """A row of the table of context lengths."""
    return [
        *(f"{n:,}" for n in (at.ctx_len, at.truncated + at.carried, at.dropped, at.lost_tokens)),
        *(f"{at.packed_rows:,}", f"{at.packed_fill:.1%}", f"{at.single_rows:,}", f"{at.single_fill:.1%}"),
    ]


def facts(found: Preview, config: PreviewConfig) -> dict[str, str]:
    """What there is to say of the records, by name."""
    n, now = found.records, found.now
    texts = n - found.conversations
    counts = (found.conversations, "conversations"), (found.pairs, "pairs of them to compare"), (texts, "texts")
    kinds = [f"{count:,} {kind}" for count, kind in counts if count]
    said = {
        "data": f"{found.data}: {n:,} records, {'' if found.is_all else 'the first ones, '}{', '.join(kinds)}",
        "reader": f"{found.reader[0]}: {found.reader[1]}",
        "template": f"{found.template[0]}: {found.template[1]}",
        "fields not used": _named(found.unread),
        "tokens": f"{found.tokens:,} in {found.tokenizer}, {found.loss_tokens:,} with loss "
        f"({found.loss_tokens / max(found.tokens, 1):.1%})",
        "vocabulary": f"{found.vocabulary[0]:,} ids of {found.vocabulary[1]}; outside it: {_named(found.outside)}",
        "tokens a record": f"{found.median:,} in the middle, {found.most:,} in 99 %, {found.longest:,} in the longest",
        f"at ctx_len {now.ctx_len}": f"{now.truncated:,} cut, {now.carried:,} carried on, {now.dropped:,} dropped, "
        f"{now.lost_tokens:,} loss tokens lost",
        "rows": f"{now.packed_rows:,} packed ({now.packed_fill:.1%} filled), {now.single_rows:,} with a document in "
        f"each ({now.single_fill:.1%}); packing is {'on' if found.packing else 'off'}",
        "copies": _repeated(found.copies, n),
        "several answers": _repeated(found.several_answers, n),
        "steps": f"{_about(config)}{found.steps:,} in the run, {found.steps_an_epoch:,} in an epoch, of "
        f"{config.batch_size * config.accumulate * config.devices * config.num_nodes:,} rows each",
        "time": _time(found, config),
    }
    if known := found.knowledge:
        said["the base"] = (
            f"loss {known.own:.2f} a token on the template's own strings ({known.own_tokens:,} tokens), "
            f"{known.text:.2f} on the text around them ({known.text_tokens:,})"
        )
    elif config.base and found.conversations:
        said["the base"] = "was not asked whether it knows the template; --ask_base loads it and does"
    return said


def title(shown: Shown, number: int) -> str:
    """What a record is headed with."""
    rows = f", in {shown.rows} rows" if shown.rows > 1 else ", of which nothing is learned" if not shown.rows else ""
    return f"{number}. {shown.where}: {shown.kind}, {shown.tokens:,} tokens, {shown.loss_tokens:,} with loss{rows}"


def _about(config: PreviewConfig) -> str:
    return "about " if config.val_split else ""


def _named(counts: dict) -> str:
    if not counts:
        return "none"
    more = f" and {len(counts) - _NAMED:,} more" if len(counts) > _NAMED else ""
    return ", ".join(f"{name} ({count:,})" for name, count in [*counts.items()][:_NAMED]) + more


def _repeated(found: Repeated, n: int) -> str:
    if not found.count:
        return "none"
    return f"{found.count:,} ({found.count / n:.1%}), such as " + ", ".join(f"{a} of {b}" for a, b in found.examples)


def _time(found: Preview, config: PreviewConfig) -> str:
    if found.speed is None or found.seconds is None:
        return f"not known: no run in {config.out} has measured a speed yet"
    took = timedelta(seconds=round(found.seconds))
    return f"about {took}, at the {found.speed:,.0f} tokens/s of the run in {config.out}"
