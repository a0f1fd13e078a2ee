"""The answers of a request in OpenAI's form: one choice for each, of chat completions and of completions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from rwkv_miss.data.tokenizers import END, Tokenizer
from rwkv_miss.generation.engine import Piece
from rwkv_miss.serving.thoughts import Thoughts

_FINISH = {"end": "stop", "stop": "stop", "max_tokens": "length", None: None}


class Choice(Protocol):
    """One answer. `add` takes its next piece and returns what it adds, as a choice of a chunk; `whole` is all that
    was added, as a choice of an answer that is not streamed."""

    def add(self, piece: Piece) -> dict[str, Any]: ...

    def whole(self) -> dict[str, Any]: ...


class ChatChoice:
    """An answer as an assistant's message.

    Args:
        begun: the beginning of the answer that the prompt holds already, such as ` <think`.
        has_logprobs: tell the log-probabilities of its tokens: of all that are chosen, those of a thought among them.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, begun: str, has_logprobs: bool) -> None:
        self._index, self._tokenizer = index, tokenizer
        self._thoughts = Thoughts()
        self._thoughts.push(begun)
        self._parts: dict[str, str] = {"content": ""}
        self._logprobs: list[dict[str, Any]] | None = [] if has_logprobs else None
        self._finish: str | None = None
        self._is_begun = False

    def add(self, piece: Piece) -> dict[str, Any]:
        delta: dict[str, str] = {} if self._is_begun else {"role": "assistant"}
        self._is_begun = True
        for new in (self._thoughts.push(piece.text), self._thoughts.finish() if piece.finish else {}):
            for part, text in new.items():
                delta[part] = delta.get(part, "") + text
                self._parts[part] = self._parts.get(part, "") + text
        self._finish = _FINISH[piece.finish]
        logprobs = None
        if self._logprobs is not None:
            logprobs = {"content": [self._logprob(*found) for found in _told(piece)]}
            self._logprobs += logprobs["content"]
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": self._finish}

    def whole(self) -> dict[str, Any]:
        return {
            "index": self._index,
            "message": {"role": "assistant", "refusal": None, **self._parts},
            "logprobs": None if self._logprobs is None else {"content": self._logprobs},
            "finish_reason": self._finish,
        }

    def _logprob(self, token: int, logprob: float, top: Iterable[tuple[int, float]]) -> dict[str, Any]:
        return {**self._token(token, logprob), "top_logprobs": [self._token(*other) for other in top]}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.decode([token])
        is_whole = "\ufffd" not in text  # a part of a character has no text of its own
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if is_whole else None}


class CompletionChoice:
    """An answer as text, as the model wrote it."""

    def __init__(self, index: int, tokenizer: Tokenizer, has_logprobs: bool) -> None:
        self._index, self._tokenizer = index, tokenizer
        self._text = ""
        self._logprobs = _Columns.empty() if has_logprobs else None
        self._offset = 0
        self._finish: str | None = None

    def add(self, piece: Piece) -> dict[str, Any]:
        self._text += piece.text
        self._finish = _FINISH[piece.finish]
        new = None
        if self._logprobs is not None:
            new = self._columns(piece)
            for column, values in zip(self._logprobs, new, strict=True):
                column += values
        return self._choice(piece.text, new)

    def whole(self) -> dict[str, Any]:
        return self._choice(self._text, self._logprobs)

    def _choice(self, text: str, logprobs: _Columns | None) -> dict[str, Any]:
        told = logprobs._asdict() if logprobs else None
        return {"index": self._index, "text": text, "logprobs": told, "finish_reason": self._finish}

    def _columns(self, piece: Piece) -> _Columns:
        found = _Columns.empty()
        for token, logprob, top in _told(piece):
            text = self._tokenizer.decode([token])
            found.tokens.append(text)
            found.token_logprobs.append(logprob)
            # Of tokens that are the same text, such as parts of characters, the likeliest stays.
            found.top_logprobs.append({self._tokenizer.decode([other]): p for other, p in reversed(top)})
            found.text_offset.append(self._offset)
            self._offset += len(text)
        return found


class _Columns(NamedTuple):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]

    @classmethod
    def empty(cls) -> _Columns:
        return cls([], [], [], [])


def _told(piece: Piece) -> Iterator[tuple[int, float, tuple[tuple[int, float], ...]]]:
    """A piece's log-probabilities, without that of the end: it has no text."""
    return ((found.id, found.logprob, found.top) for found in piece.logprobs if found.id != END)
