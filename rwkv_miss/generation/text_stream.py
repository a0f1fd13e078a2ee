"""Token ids as text while they come: neither a character nor a stop string is ever cut in two."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rwkv_miss.data.tokenizers import END, Tokenizer

# What a tokenizer writes for bytes that are not, or not yet, UTF-8.
_BROKEN = "\ufffd"
# How many tokens that settle the text before them are decoded again with each new token. A character has at most
# 4 bytes, so a character that is cut at the first of these tokens cannot affect the text of the last.
_CONTEXT = 8
# What stands around a thought at the beginning of a text.
_THOUGHT, _THOUGHTS_END = "<think", "</think>"


class Detokenizer:
    """The text of one sequence of token ids. All that `push` and `finish` return, joined, is
    `tokenizer.decode(ids)`; each token costs the decoding of a few tokens, however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the newest ids, as far back as their text may depend on each other
        self._returned = 0  # characters of the text of _ids that were returned already
        self._limit = 2 * _CONTEXT  # the number of _ids from which on the oldest are forgotten

    def push(self, token: int) -> str:
        """The text that this token adds and that no later token can change; often that is nothing."""
        if token == END:
            return ""
        self._ids.append(token)
        if not self._tokenizer.settles(token):
            return ""
        text = self._tokenizer.decode(self._ids)
        settled = len(text) - text.endswith(_BROKEN)  # the last character may still become another
        new = text[self._returned : settled]
        self._returned = max(self._returned, settled)
        if len(self._ids) >= self._limit:
            self._forget(text)
        return new

    def finish(self) -> str:
        """The rest of the text, when no token follows."""
        text = self._tokenizer.decode(self._ids)
        return text[self._returned :]

    def _forget(self, text: str) -> None:
        """Forgets all but the newest ids. `text` is the text of all. That of the kept ids may begin otherwise, as a
        first word may; if it ends in the text that was not returned yet, that does not matter, else nothing is
        forgotten."""
        settling = [i for i, token in enumerate(self._ids) if self._tokenizer.settles(token)]
        kept = self._ids[settling[-_CONTEXT] :] if len(settling) >= _CONTEXT else self._ids
        unreturned = text[self._returned :]
        text = self._tokenizer.decode(kept)
        if len(text) > len(unreturned) and text.endswith(unreturned):
            self._ids, self._returned = kept, len(text) - len(unreturned)
        self._limit = 2 * len(self._ids)


class StopStrings:
    """Text up to the first stop string: of those that occur the one that is complete first, and of those complete
    at the same character the longest. So it does not matter how the text is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""  # text that may be the beginning of a stop string

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is no part of a stop string, whether a stop string follows it). After a stop string nothing
        may be pushed."""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            return self._held[: min(found)[1]], True
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        first = max(len(self._held) - longest, 0)
        while first < len(self._held) and not any(stop.startswith(self._held[first:]) for stop in self._stops):
            first += 1
        free, self._held = self._held[:first], self._held[first:]
        return free, False

    def finish(self) -> str:
        """What was held back, when no text follows."""
        return self._held


class Stripped:
    """Text without white space at its ends, while it comes: white space is held back until more text follows it."""

    def __init__(self) -> None:
        self._held = ""
        self._is_begun = False

    def push(self, text: str) -> str:
        """What this adds; often that is nothing."""
        new = self._held + text if self._is_begun else text.lstrip()
        self._is_begun = self._is_begun or bool(new)
        kept = new.rstrip()
        self._held = new[len(kept) :]
        return kept


def thoughts_apart(pieces: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Pieces of a text as pieces of the same, each with whether it belongs to the thought that the text begins with:
    from `<think` to `</think>`, or to the end where that does not come."""
    held, is_thought, last = "", None, ""
    for piece in pieces:
        held += piece
        if is_thought is None and held != _THOUGHT and _THOUGHT.startswith(held):
            continue
        if is_thought is None:
            is_thought = held.startswith(_THOUGHT)
        if is_thought:
            last += held
            _, end, answer = last.partition(_THOUGHTS_END)
            yield held[: len(held) - len(answer)], True
            held, is_thought = answer, not end
            last = last[-len(_THOUGHTS_END) :]
        if held and not is_thought:
            yield held, False
            held = ""
    if held:
        yield held, False
