"""The model cards that commands write beside what they have made."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def check_free(path: Path, overwrite: bool) -> None:
    """UserError if a card would take the place of a file that is there."""
    from rwkv_miss.errors import UserError

    if os.path.exists(path) and not overwrite:  # false for a name that is too long too
        raise UserError(
            f"{path}: is there already, and a card would be written to it; give another out, --card false for no "
            "card, or --overwrite true to replace it"
        )


def write_card(
    path: Path,
    title: str,
    introduction: str,
    version: int | str,
    folders: Sequence[str],
    facts: Sequence[Mapping[str, Any]],
    made: tuple[str, Mapping[str, Any]],
    command: str,
    uses: Mapping[str, tuple[str, str]],
) -> None:
    """Writes the card of what was made of adapters.

    Args:
        version: the model's.
        folders, facts: of the adapters, and what is recorded with them.
        made: the heading and the facts of what the command did. command: the command itself.
        uses: the ways to run it: name -> (language, code).
    """
    import rwkv_miss
    from rwkv_miss.export.card import model_card
    from rwkv_miss.files import atomic_write
    from rwkv_miss.training.card import tags_of

    sections: dict[str, Mapping[str, Any]] = {}
    for folder, known in zip(folders, facts, strict=True):
        of_which = f" of {folder}" if len(folders) > 1 else ""
        sections |= {f"{heading}{of_which}": section for heading, section in known.get("card", {}).items()}
    heading, section = made
    methods = "+".join(dict.fromkeys(known["method"] for known in facts if known.get("method")))
    text = model_card(
        title,
        introduction,
        tags_of(version, methods or heading.lower()),
        {**sections, heading: section},
        [*(known["command"] for known in facts if known.get("command")), command],
        uses,
        version=rwkv_miss.__version__,
    )
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8", errors="replace")
