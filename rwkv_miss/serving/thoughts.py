"""A model's answer parted into its thought, between <think> and </think> at its beginning, and what it says."""

from __future__ import annotations

from collections import defaultdict
from typing import Literal

from rwkv_miss.generation.text_stream import Stripped

Part = Literal["reasoning_content", "content"]
"""As they are called in a message of an answer."""
_BEGIN, _END = "<think>", "</think>"


class Thoughts:
    """The parts of one answer, while it comes. Each part loses the white space at its ends, and no mark is ever cut in
    two. A thought without an end is all that there is."""

    def __init__(self) -> None:
        self._part: Part | None = None  # None until it is known whether there is a thought
        self._held = ""  # text that may be a part of a mark
        self._stripped: dict[Part, Stripped] = defaultdict(Stripped)

    def push(self, text: str) -> dict[Part, str]:
        """What this adds to each part."""
        self._held += text
        if self._part is None:
            begun = self._held.lstrip()
            if _BEGIN.startswith(begun):
                return {}
            self._part = "reasoning_content" if begun.startswith(_BEGIN) else "content"
            self._held = begun.removeprefix(_BEGIN)
        found: dict[Part, str] = {}
        if self._part == "reasoning_content":
            thought, end, said = self._held.partition(_END)
            if not end:
                n_kept = max(n for n in range(len(_END)) if thought.endswith(_END[:n]))
                thought, said = thought[: len(thought) - n_kept], thought[len(thought) - n_kept :]
            self._add(found, thought)
            self._held = said
            if not end:
                return found
            self._part = "content"
        self._add(found, self._held)
        self._held = ""
        return found

    def finish(self) -> dict[Part, str]:
        """The rest, when no text follows."""
        found: dict[Part, str] = {}
        self._part = self._part or "content"
        self._add(found, self._held)
        return found

    def _add(self, found: dict[Part, str], text: str) -> None:
        assert self._part
        if new := self._stripped[self._part].push(text):
            found[self._part] = new
