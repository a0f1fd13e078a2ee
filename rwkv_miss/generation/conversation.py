"""A conversation with a model, which reads each token once: a turn goes on from the state that the one before has left.

talk = Conversation(model, tokenizer, options, Sampling(max_tokens=100))
for piece in talk.ask("Hi"):
    print(piece.text, end="")
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from typing import Any, NamedTuple

import torch

from rwkv_miss.adapters.inject import held_tensors
from rwkv_miss.config import DataOptions
from rwkv_miss.data.records import Turn
from rwkv_miss.data.rendering import answer_turn, chat_spans
from rwkv_miss.data.templates import find_template
from rwkv_miss.data.tokenizers import Tokenizer
from rwkv_miss.errors import UserError
from rwkv_miss.fingerprints import fingerprint
from rwkv_miss.generation.engine import Engine, Finish, Piece
from rwkv_miss.generation.generate import seed_of
from rwkv_miss.generation.sampling import Sampling
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.initial_state import is_state
from rwkv_miss.model.state import State, state_facts

# The newest states that are kept, for turns that are taken back: the text of older ones would be read again.
_KEPT = 8
# The name of a conversation among the facts of a state's file.
_FACT = "conversation"
# Stand for turns that are yet to come.
_QUESTION, _ANSWER = Turn("user", "..."), Turn("assistant", "...")


class _Read(NamedTuple):
    """The state of one sequence after these tokens; None is the one that all begin with."""

    ids: list[int]
    state: State | None


class Conversation:
    """The turns of a conversation, and the states that the model was in.

    What the model reads is always the template's text of the turns, encoded as in training. A state is gone on from
    only where the tokens that it has read are the beginning of those: so it does not matter that a template leaves out
    the thoughts of earlier answers, that an answer's tokens are others when it is encoded as text, or that turns were
    taken back.

    Args:
        options: the template, of `settled`.
        sampling: of each answer; the template's stops are added, and each answer has a seed of its own.
        opening: what the conversation begins with: a system turn, or nothing.

    `turns` are those so far, which end in an answer. `finish` says why the newest answer ended; None where it was left.
    """

    def __init__(
        self,
        model: RWKV,
        tokenizer: Tokenizer,
        options: DataOptions,
        sampling: Sampling,
        opening: Sequence[Turn] = (),
    ) -> None:
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self._sampling = replace(sampling, stop=(*sampling.stop, *find_template(options.template).stops))
        self._opening = self.turns = tuple(opening)
        self.finish: Finish | None = None
        self._states: deque[_Read] = deque(maxlen=_KEPT)
        self._asked = 0

    def ask(self, question: str) -> Generator[Piece, None, None]:
        """The pieces of the model's answer, each as soon as it is known. A loop over them that is left early, or ended
        by an exception such as KeyboardInterrupt, leaves what was said until then as the answer. Where nothing was
        said, the turns are as they were.

        Raises:
            UserError: the template has no form for the turns, or the model lacks a token of the question.
            RunError: the model's logits are not finite.
        """
        asked = (*self.turns, Turn("user", question))
        ids = self._encoded(chat_spans(asked, self._options))
        read = self._newest(ids)
        # What later turns begin with too is read first, and its state kept: their text may go on otherwise than this
        # answer's prompt, as where that begins a thought, and the answer's tokens need not be those of its text.
        later = self._encoded(chat_spans((*asked, _ANSWER, _QUESTION), self._options))
        common = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids[:-1], later, strict=False))]
        if len(read.ids) < len(common):
            read = self._read(common)
        sampling = replace(self._sampling, seed=seed_of(self._sampling.seed, self._asked))
        self._asked += 1
        engine = Engine(self._model, self._tokenizer)
        engine.add(ids[len(read.ids) :], sampling, state=read.state, keep_state=True)
        written: list[str] = []
        self.finish = None
        try:
            for piece in engine:
                ids += piece.ids
                written.append(piece.text)
                self.finish = piece.finish
                if piece.finish:
                    self._states.append(_Read(ids[:-1], piece.state))
                yield piece
        finally:
            if answer := answer_turn("".join(written), self._options):
                self.turns = (*asked, answer)

    def undo(self) -> bool:
        """Takes back the last question and its answer. False where there is none."""
        if not self._has_answers():
            return False
        self.turns = self.turns[:-2]
        return True

    def reset(self) -> None:
        """Takes back all turns but the opening."""
        self.turns = self._opening

    def save(self, path: str | os.PathLike) -> None:
        """Writes the turns, and the state of a model that has read them, to a .safetensors file.

        Raises:
            UserError: there are no answers yet, a file is there that is no conversation, or it cannot be written.
        """
        if not self._has_answers():
            raise UserError("there is no answer yet, so that there is nothing to save")
        if os.path.lexists(path) and _FACT not in state_facts(path):
            raise UserError(f"{path}: is there and holds no conversation; give another name")
        read = self._read(self._encoded(chat_spans((*self.turns, _QUESTION), self._options)[:-1]))
        assert read.state is not None
        turns = [(turn.role, turn.content) for turn in self.turns]
        facts = {"turns": turns, "ids": read.ids, **_identity(self._model)}
        read.state.save(path, {_FACT: json.dumps(facts)})

    def load(self, path: str | os.PathLike) -> None:
        """Goes on with a conversation that `save` wrote.

        Raises:
            UserError: the file holds none, or was written with another model; the turns are then as they were.
        """
        facts = _checked(state_facts(path), path)
        for name, value in _identity(self._model).items():
            if facts.get(name) != value:
                raise UserError(f"{path}: was saved with another {name}; give the options that it was saved with")
        state = State.load(path).to(self._model.emb.weight.device, self._model.emb.weight.dtype)
        state.check(self._model.config, 1, self._model.emb.weight)
        if not all(torch.isfinite(x).all() for x in (state.att_shift, state.wkv, state.ffn_shift)):
            raise UserError(f"{path}: the state has values that are not finite; the file is damaged")
        turns = tuple(Turn(*turn) for turn in facts["turns"])
        chat_spans((*turns, _QUESTION), self._options)
        self.turns = turns
        self._states.append(_Read(facts["ids"], state))

    def _has_answers(self) -> bool:
        return any(turn.role == "assistant" for turn in self.turns)

    def _encoded(self, spans: Sequence[str]) -> list[int]:
        return [token for span in spans for token in self._tokenizer.encode(span)]

    def _newest(self, ids: Sequence[int]) -> _Read:
        """The state that has read the most of `ids`, but not all of them."""
        found = [read for read in self._states if len(read.ids) < len(ids) and ids[: len(read.ids)] == read.ids]
        return max(found, key=lambda read: len(read.ids), default=_Read([], None))

    def _read(self, ids: list[int]) -> _Read:
        """The state that has read `ids`, which is kept."""
        with suppress(StopIteration):
            return next(read for read in self._states if read.ids == ids)
        read = self._newest(ids)
        engine = Engine(self._model, self._tokenizer)
        engine.add(ids[len(read.ids) :], Sampling(max_tokens=1), state=read.state, keep_state=True)
        *_, last = engine  # the state has not read the one token that is chosen
        self._states.append(_Read(ids, last.state))
        return self._states[-1]


def _identity(model: RWKV) -> dict[str, str]:
    """What the states of a model depend on, by the names that messages have for it."""
    own = {name: p for name, p in model.named_parameters() if is_state(name)}
    tensors = own | (held_tensors(model) if model.adapters else {})
    trained = fingerprint({name: tensor.detach().cpu() for name, tensor in tensors.items()})
    return {"model": model.fingerprint, "adapter, learned state or dtype": trained}


def _checked(found: dict[str, str], path: str | os.PathLike) -> dict[str, Any]:
    """The facts of a conversation's file. Raises UserError if they are not what `Conversation.save` writes."""
    if _FACT not in found:
        raise UserError(f"{path}: holds a state, but no conversation; give a file that /save wrote")
    try:
        facts = json.loads(found[_FACT])
        turns, ids = facts["turns"], facts["ids"]
        roles = [role for role, content in turns if isinstance(content, str) and content.strip()]
        rest = roles[roles[:1] == ["system"] :]
        is_sound = bool(rest) and len(roles) == len(turns) and rest == ["user", "assistant"] * (len(rest) // 2)
        is_sound = is_sound and bool(ids) and all(type(token) is int for token in ids)
    except (ValueError, LookupError, TypeError, RecursionError):
        is_sound = False
    if not is_sound:
        raise UserError(f"{path}: the conversation in it is damaged; give a file that /save wrote")
    return facts
