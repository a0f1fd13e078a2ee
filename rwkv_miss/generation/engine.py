"""Text for many sequences at once, by continuous batching: between any two tokens, sequences may join or leave the
batch.

engine = Engine(model, tokenizer)
first = engine.add("User: Hi\n\nAssistant:", Sampling(max_tokens=100))
for piece in engine:            # until no member is left; `add` and `cancel` may be called in the loop
    print(piece.member, piece.text, piece.finish)
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rwkv_miss.adapters.serving import Adapters, Served
from rwkv_miss.data.tokenizers import END, Tokenizer
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.generation.prefix_cache import PrefixCache
from rwkv_miss.generation.sampling import Sampling, TokenLogprob, adjust, choose, log_probabilities
from rwkv_miss.generation.text_stream import Detokenizer, StopStrings
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.state import State

Finish = Literal["end", "stop", "max_tokens", "cancelled", "not_finite"]
"""Why a text ended: token `END`, a stop string, `Sampling.max_tokens`, `Engine.cancel`, or logits that are infinite or
not numbers."""

# The most tokens, over all its prompts, of one forward pass over prompts.
_MAX_POSITIONS = 2048


class Piece(NamedTuple):
    """What one step added to one member.

    member: what `Engine.add` returned.
    text: the new text. It may be empty: what may still become a part of a character or of a stop string is held back.
    ids: the token ids chosen in this step; an `END` or a stop string's tokens are among them.
    finish: why the text ended, in the member's last piece; None in all others.
    state: in the last piece of a member with `keep_state` the state of one sequence that has read the prompt and all
        ids but the last one, so that `add([last_id, *further_ids], state=state)` goes on. None where the member was
        cancelled before its prompt had been read, or its logits are not finite.
    logprobs: what `Sampling.logprobs` asks for, for each of `ids`.
    cached_tokens: how many of the prompt's tokens had been read before (`Engine`'s prefix_cache_bytes).
    """

    member: int
    text: str
    ids: tuple[int, ...] = ()
    finish: Finish | None = None
    state: State | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0


@dataclass(eq=False)
class _Member:
    number: int
    sampling: Sampling
    generator: torch.Generator | None
    keep_state: bool
    detokenizer: Detokenizer
    stops: StopStrings
    unread: list[int]  # those of the prompt's tokens that the model has not read
    state: State | None  # of one sequence, until the prompt has been read; None is the initial one
    adapter: Served | None
    prompt: list[int] | None  # all of its tokens; None where they go on from a state that the caller gave
    logits: Tensor | None = None  # (V,) after the prompt, where they are known without reading
    cached_tokens: int = 0
    ids: list[int] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)  # how often `ids` has each token
    is_cancelled: bool = False

    def write(self, token: int, logprobs: tuple[TokenLogprob, ...]) -> Piece:
        self.ids.append(token)
        self.counts[token] += 1
        text, is_stopped = self.stops.push(self.detokenizer.push(token))
        piece = Piece(self.number, text, (token,), logprobs=logprobs, cached_tokens=self.cached_tokens)
        if is_stopped:
            return piece._replace(finish="stop")
        if token == END or len(self.ids) == self.sampling.max_tokens:
            return self.end("end" if token == END else "max_tokens", piece)
        return piece

    def end(self, finish: Finish, piece: Piece | None = None) -> Piece:
        """The last piece: `piece` and what the detokenizer held back, which may complete a stop string."""
        piece = piece or Piece(self.number, "", cached_tokens=self.cached_tokens)
        rest, is_stopped = self.stops.push(self.detokenizer.finish())
        if is_stopped:
            return piece._replace(text=piece.text + rest, finish="stop")
        return piece._replace(text=piece.text + rest + self.stops.finish(), finish=finish)


class _Read(NamedTuple):
    """Members whose prompts have been read to their ends, the logits (B, V) after these, and the state."""

    members: list[_Member]
    logits: Tensor
    state: State


class Engine:
    """A batch of sequences on one model. A member's text depends only on its own prompt, settings and state, except for
    the rounding of sums, which differs a little with the size of the batch.

    Memory grows with the number of members and of adapters only, which the caller limits: the state of each member has
    the same size however long its text is, and prompts are read in pieces. `len(engine)` is the number of members
    present. An error of the model itself, such as a lack of memory, leaves the engine unusable.

    `adapters` are those that members can be run with, each with its own, in the same batch; `engine.adapters.add(name,
    folder)` and `remove(name)` may be called between any two steps.

    Args:
        model: its `hidden` and its `head` are called, for the logits of the last token alone.
        tokenizer: the one that the model was trained with.
        max_positions: most tokens, all sequences together and padding counted, that one forward reads of prompts;
            2,048 when not given.
        prefix_cache_bytes: how much memory of the model's device may hold states of prompts and of finished texts: a
            prompt that begins with one of these, with the same adapter, is read from there on.
    """

    def __init__(
        self, model: RWKV, tokenizer: Tokenizer, max_positions: int | None = None, prefix_cache_bytes: int = 0
    ) -> None:
        assert (max_positions is None or max_positions >= 1) and prefix_cache_bytes >= 0
        self._cache = PrefixCache(prefix_cache_bytes)
        self.adapters = Adapters(model, on_remove=self._cache.drop)
        self._model = model
        self._tokenizer = tokenizer
        self._vocab_size = model.config.vocab_size
        self._max_positions = max_positions or _MAX_POSITIONS
        self._added = 0
        self._members: dict[int, _Member] = {}  # all that are present, by number
        self._waiting: list[_Member] = []  # those whose prompts have not been read to the end, in order of arrival
        self._running: list[_Member] = []  # the others: row i of the state is the i-th of them
        self._state: State | None = None
        self._to_yield: deque[Piece] = deque()  # the rest of a step's pieces, also when a loop over them is left

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Piece]:
        """The pieces of all steps, until no member is left. After a loop that was left early, a new one goes on with
        the next piece.

        Raises:
            RunError: the logits of a member are not finite. The member has left, and a new loop may be begun.
        """
        while self._to_yield or self._members:
            if not self._to_yield:
                self._to_yield.extend(self.step())
                continue
            piece = self._to_yield.popleft()
            if piece.finish == "not_finite":
                raise RunError(
                    "the model's logits are not finite; its weights, or the state it begins from, are damaged"
                )
            yield piece

    def add(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        *,
        state: State | None = None,
        keep_state: bool = False,
        adapter: str | None = None,
    ) -> int:
        """A new member, which joins at the next step.

        Args:
            prompt: text, or its token ids.
            sampling: None is `Sampling()`.
            state: of one sequence, which the prompt goes on with; None is the initial state of the model, or of the
                adapter. It is not changed.
            keep_state: return the member's state in its last piece.
            adapter: the name of one of `adapters`; None is the model alone.

        Returns:
            The member's number: 0 for the first, 1 for the next, ...

        Raises:
            UserError: the prompt is empty or has tokens that the model lacks, the state does not fit the model, or
                there is no such adapter.
        """
        served = None if adapter is None else self.adapters.find(adapter)
        ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise UserError("the prompt is empty; give it at least one character")
        if wrong := [token for token in ids if not 0 <= token < self._vocab_size]:
            text = prompt if isinstance(prompt, str) else self._tokenizer.decode([t for t in ids if t >= 0])
            raise UserError(
                f"the prompt {text[:40]!r} has token {max(wrong)}, beyond the model's vocabulary of "
                f"{self._vocab_size}; choose the tokenizer that the model was trained with"
            )
        sampling = sampling or Sampling()
        if wrong := [token for token in sampling.logit_bias if not 0 <= token < self._vocab_size]:
            raise UserError(f"logit_bias has token {wrong[0]}; the model has the tokens 0 to {self._vocab_size - 1}")
        if state is not None:
            state.check(self._model.config, 1, self._model.emb.weight)
        member = _Member(
            number=self._added,
            sampling=sampling,
            generator=sampling.generator(self._device),
            keep_state=keep_state,
            detokenizer=Detokenizer(self._tokenizer),
            stops=StopStrings(sampling.stop),
            unread=list(ids),
            state=state.detach() if state else served.state if served else None,
            adapter=served,
            prompt=None if state else ids,
        )
        if not state and (kept := self._cache.find(served, ids)):
            del member.unread[: kept.length]
            member.state, member.logits, member.cached_tokens = kept.state, kept.logits, kept.length
        self.adapters.begin(served)
        self._added += 1
        self._members[member.number] = member
        self._waiting.append(member)
        return member.number

    def cancel(self, member: int) -> None:
        """The member leaves at the next step, with a last piece that says "cancelled". One that has ended already is
        left as it is."""
        if member in self._members:
            self._members[member].is_cancelled = True

    @torch.no_grad()
    def step(self) -> list[Piece]:
        """Writes one token for each member whose prompt has been read, and reads the next part of the others' prompts.

        Returns a piece for each member that got a token or was cancelled. A member whose logits are not finite leaves
        without a token, with the finish "not_finite"; the others are not affected.
        """
        cancelled = [member for member in self._members.values() if member.is_cancelled]
        pieces = self._leave([member.end("cancelled") for member in cancelled])
        logits, states = [], []
        if self._running:
            of_running, state = self._run(self._running, [member.ids[-1:] for member in self._running], self._state)
            logits.append(of_running)
            states.append(state)
        for read in (self._take_kept_prompts, self._read_short_prompts, self._read_long_prompts):
            if found := read():
                self._running += found.members
                self._cache_prompts(found)
                logits.append(found.logits)
                states.append(found.state)
        if not self._running:
            return pieces
        self._waiting = [member for member in self._waiting if member.unread]
        self._state = State.cat(states) if len(states) > 1 else states[0]
        together = torch.cat(logits) if len(logits) > 1 else logits[0]
        return pieces + self._leave(self._write(together.float()))

    def _take_kept_prompts(self) -> _Read | None:
        """The prompts that the cache has to their ends. None where there are none, as of the other two."""
        members = [member for member in self._waiting if not member.unread]
        if not members:
            return None
        logits = [member.logits for member in members if member.logits is not None]
        states = [member.state for member in members if member.state is not None]
        for member in members:
            member.state = member.logits = None
        return _Read(members, torch.stack(logits), State.cat(states))

    def _read_short_prompts(self) -> _Read | None:
        """Reads the longest-waiting prompts that can be read whole in one forward.

        They end together: shorter ones are padded on the left, and the state starts afresh at their first token. A
        prompt that goes on from a state cannot be padded, as the padding would change the state.
        """
        group: list[_Member] = []
        width = 0
        for member in self._waiting:
            length = len(member.unread)
            if not length or member.state is not None or length > self._max_positions:
                continue
            if (len(group) + 1) * max(width, length) > self._max_positions:
                break
            group.append(member)
            width = max(width, length)
        if not group:
            return None
        tokens = [[END] * (width - len(member.unread)) + member.unread for member in group]
        starts = self._tensor([[width - len(member.unread)] for member in group])
        logits, state = self._run(group, tokens, None, torch.arange(width, device=self._device) == starts)
        for member in group:
            member.unread = []
        return _Read(group, logits, state)

    def _read_long_prompts(self) -> _Read | None:
        """Reads the same number of tokens of each of the other prompts: as many as the one nearest to its end has left,
        or as fit into one forward."""
        unread = [member for member in self._waiting if member.unread]
        group = [m for m in unread if m.state is not None or len(m.unread) > self._max_positions]
        group = group[: self._max_positions]
        if not group:
            return None
        n_tokens = min(min(len(member.unread) for member in group), self._max_positions // len(group))
        tokens = [member.unread[:n_tokens] for member in group]
        state = seq_start = None
        if begun := next((member.state for member in group if member.state is not None), None):
            # Members without a state begin here: their rows of the state are placeholders, which are not used.
            state = State.cat([member.state or begun for member in group])
            begins = self._tensor([[member.state is None] for member in group])
            seq_start = begins & (torch.arange(n_tokens, device=self._device) == 0)
        logits, state = self._run(group, tokens, state, seq_start)
        for row, member in enumerate(group):
            del member.unread[:n_tokens]
            member.state = _rows(state, [row]) if member.unread else None
        done = [row for row, member in enumerate(group) if not member.unread]
        if not done:
            return None
        return _Read([group[row] for row in done], logits[done], _rows(state, done))

    def _write(self, logits: Tensor) -> list[Piece]:
        """The next token of each running member, from logits (B, V)."""
        # The ends of a row, which are not numbers where one of its numbers is none: isfinite makes tensors of all.
        # (amax and amin are vectorised on a CPU, where aminmax takes four times as long.)
        ends = torch.stack((logits.amax(dim=-1), logits.amin(dim=-1)))
        finite = torch.isfinite(ends).all(dim=0).tolist()
        members = [member for member, is_finite in zip(self._running, finite, strict=True) if is_finite]
        pieces = []
        if len(members) < len(finite):
            lost = [member for member, is_finite in zip(self._running, finite, strict=True) if not is_finite]
            pieces = [Piece(m.number, "", finish="not_finite", cached_tokens=m.cached_tokens) for m in lost]
            logits = logits[torch.tensor(finite, device=logits.device)]
        samplings = [member.sampling for member in members]
        adjusted = adjust(logits, samplings, [member.counts for member in members])
        tokens = choose(adjusted, samplings, [member.generator for member in members])
        logprobs = log_probabilities(logits, tokens, samplings)
        return [m.write(token, told) for m, token, told in zip(members, tokens, logprobs, strict=True)] + pieces

    def _leave(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces, the last ones with the states that were asked for. Members whose last piece is among them are
        taken out of the batch."""
        ended = {piece.member for piece in pieces if piece.finish}
        if not ended:
            return pieces
        if self._state is not None:
            rows = {member.number: row for row, member in enumerate(self._running)}
            for i, piece in enumerate(pieces):
                if piece.finish in (None, "not_finite") or piece.member not in rows:
                    continue
                member = self._members[piece.member]
                if member.keep_state or self._cache.budget:
                    state = _rows(self._state, [rows[piece.member]])
                    self._cache_state(member, state)
                    if member.keep_state:
                        pieces[i] = piece._replace(state=state)
            staying = [member for member in self._running if member.number not in ended]
            if len(staying) < len(self._running):
                self._state = _rows(self._state, [rows[member.number] for member in staying]) if staying else None
                self._running = staying
        for number in ended:
            self.adapters.end(self._members.pop(number).adapter)
        self._waiting = [member for member in self._waiting if member.number not in ended]
        return pieces

    def _cache_prompts(self, found: _Read) -> None:
        """Lets the cache have the states and the logits after prompts."""
        if self._cache.budget:
            for row in torch.isfinite(found.logits).all(dim=-1).nonzero().flatten().tolist():
                self._cache_state(found.members[row], _rows(found.state, [row]), found.logits[row].clone())

    def _cache_state(self, member: _Member, state: State, logits: Tensor | None = None) -> None:
        """Lets the cache have the state of a member, which has read its prompt and all ids but the last one."""
        is_removed = member.adapter is not None and member.adapter.is_removed
        if member.prompt is not None and not is_removed:
            self._cache.keep(member.adapter, [*member.prompt, *member.ids[:-1]], state, logits)

    def _run(
        self, members: list[_Member], tokens: list[list[int]], state: State | None, seq_start: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The model's logits (B, V) after the last token and its state, for the rows of `members`."""
        with self.adapters.acting([member.adapter for member in members]):
            hidden, state = self._model.hidden(self._tensor(tokens), state, seq_start)
            return self._model.head(hidden[:, -1]), state

    @property
    def _device(self) -> torch.device:
        return self._model.emb.weight.device

    def _tensor(self, rows: list) -> Tensor:
        return torch.tensor(rows, device=self._device)


def _rows(state: State, rows: list[int]) -> State:
    """The state of these sequences alone, in memory of its own."""
    index = torch.tensor(rows, device=state.wkv.device)
    return state.map(lambda x: x.index_select(1, index))
