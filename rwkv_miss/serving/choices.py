"""The answers of a request in OpenAI's form: one choice for each, of chat completions and of completions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

from rwkv_miss.data.tokenizers import END, Tokenizer
from rwkv_miss.generation.engine import Piece
from rwkv_miss.generation.sampling import TokenLogprob
from rwkv_miss.serving.thoughts import Thoughts

_FINISH = {"end": "stop", "stop": "stop", "max_tokens": "length", None: None}


class Choice(Protocol):
    """One answer. `add` takes its next piece and returns what that adds, as a choice of a chunk; `whole` is all that
    was added, as a choice of an answer that is not streamed.

    With log-probabilities these are told of all tokens that were chosen, those of thoughts and of stop strings among
    them, but for the end of the document, which has no text.
    """

    def add(self, piece: Piece) -> dict[str, Any]: ...

    def whole(self) -> dict[str, Any]: ...


class ChatChoice:
    """An answer as an assistant's message. begun: the beginning of it that the prompt holds already."""

    def __init__(self, index: int, tokenizer: Tokenizer, begun: str, has_logprobs: bool) -> None:
        self._index, self._tokenizer = index, tokenizer
        self._thoughts = Thoughts()
        self._thoughts.push(begun)
        self._parts: dict[str, str] = {"content": ""}
        self._told: list[TokenLogprob] | None = [] if has_logprobs else None
        self._finish: str | None = None
        self._is_begun = False

    def add(self, piece: Piece) -> dict[str, Any]:
        delta: dict[str, str] = {} if self._is_begun else {"role": "assistant", "content": ""}
        self._is_begun = True
        for new in (self._thoughts.push(piece.text), self._thoughts.finish() if piece.finish else {}):
            for part, text in new.items():
                delta[part] = delta.get(part, "") + text
                self._parts[part] = self._parts.get(part, "") + text
        self._finish = _FINISH[piece.finish]
        logprobs = None
        if self._told is not None:
            self._told += (told := _with_text(piece))
            logprobs = self._logprobs(told)
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": self._finish}

    def whole(self) -> dict[str, Any]:
        return {
            "index": self._index,
            "message": {"role": "assistant", "refusal": None, **self._parts},
            "logprobs": None if self._told is None else self._logprobs(self._told),
            "finish_reason": self._finish,
        }

    def _logprobs(self, told: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = [
            {**self._token(found.id, found.logprob), "top_logprobs": [self._token(*other) for other in found.top]}
            for found in told
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.decode([token])
        is_whole = "\ufffd" not in text  # a part of a character has no text of its own
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if is_whole else None}


class CompletionChoice:
    """An answer as text, as the model wrote it."""

    def __init__(self, index: int, tokenizer: Tokenizer, has_logprobs: bool) -> None:
        self._index, self._tokenizer = index, tokenizer
        self._text = ""
        self._told: list[TokenLogprob] | None = [] if has_logprobs else None
        self._offset = 0  # characters of the tokens before those that a chunk tells of
        self._finish: str | None = None

    def add(self, piece: Piece) -> dict[str, Any]:
        self._text += piece.text
        self._finish = _FINISH[piece.finish]
        logprobs = None
        if self._told is not None:
            self._told += (told := _with_text(piece))
            logprobs = self._logprobs(told, self._offset)
            self._offset += sum(map(len, logprobs["tokens"]))
        return self._choice(piece.text, logprobs)

    def whole(self) -> dict[str, Any]:
        return self._choice(self._text, None if self._told is None else self._logprobs(self._told, 0))

    def _choice(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": self._finish}

    def _logprobs(self, told: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        decode = self._tokenizer.decode
        texts = [decode([found.id]) for found in told]
        return {
            "tokens": texts,
            "token_logprobs": [found.logprob for found in told],
            # Of tokens that are the same text, such as parts of characters, the likeliest stays.
            "top_logprobs": [{decode([token]): p for token, p in reversed(found.top)} for found in told],
            "text_offset": list(accumulate(map(len, texts[:-1]), initial=offset)) if texts else [],
        }


def _with_text(piece: Piece) -> list[TokenLogprob]:
    return [found for found in piece.logprobs if found.id != END]
