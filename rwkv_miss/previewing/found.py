"""What a preview holds, as plain values: the terminal, JSON and the page all show this."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A stretch of a record's text, and its token ids. learned: it carries loss. is_cut: it lies behind the end that
    ctx_len cuts off, so that the model never sees it. is_end: it stands for token 0, the end of the document."""

    text: str
    ids: list[int]
    learned: bool
    is_cut: bool = False
    is_end: bool = False


@dataclass(frozen=True)
class Shown:
    """A record: where it is, what the model learns from it, and its text. `rows` are those that it is divided over.
    kind: conversation or plain text."""

    where: str
    kind: str
    tokens: int
    loss_tokens: int
    rows: int
    pieces: list[Piece]


@dataclass(frozen=True)
class AtLength:
    """What becomes of the records at a ctx_len, and the rows that they make: packed, and one document in each. fill is
    the share of the positions that are computed that holds no padding."""

    ctx_len: int
    truncated: int
    carried: int
    dropped: int
    lost_tokens: int
    tokens: int
    packed_rows: int
    packed_fill: float
    single_rows: int
    single_fill: float


@dataclass(frozen=True)
class Knowledge:
    """What a base thinks of a template: the mean of -log p, in nats, of the template's own strings and of the text
    around them, and over how many tokens each."""

    own: float
    own_tokens: int
    text: float
    text_tokens: int


@dataclass(frozen=True)
class Repeated:
    """How many records repeat an earlier one in some way, and the places of some of them and of those earlier ones."""

    count: int
    examples: list[tuple[str, str]]


@dataclass(frozen=True)
class Preview:
    """Figures of the records that were read: all of them, or the first if `is_all` is false.

    reader, template: their names, each with the reason for it. vocabulary: the number of ids, and whose it is.

    records, conversations: how many there are; what is no conversation is plain text. pairs: those of two answers to
    compare, each of which counts as two conversations. without_loss: those of which
    nothing is learned. tokens: the targets. median, most, longest: half, 99 % and all of the records have so many
    tokens at most. histogram: (the most tokens, how many records have no more, but more than those before).
    copies: records that are copies of earlier ones; several_answers: those whose prompt an earlier one has with
    another answer. outside: the tokens that the vocabulary lacks, and how often each is there. refused: how many
    records train would refuse, with its message for the first. unread: the fields that are not read, and how many
    records have them.

    steps_an_epoch and steps are optimizer steps. seconds: of the whole run at `speed` tokens/s, None where no run has
    measured one. warnings: what deserves a look, in sentences.
    """

    data: str
    is_all: bool
    reader: tuple[str, str]
    template: tuple[str, str]
    tokenizer: str
    vocabulary: tuple[int, str]
    ctx_len: int
    packing: bool
    records: int
    pairs: int
    conversations: int
    without_loss: int
    tokens: int
    loss_tokens: int
    median: int
    most: int
    longest: int
    histogram: list[tuple[int, int]]
    lengths: list[AtLength]
    copies: Repeated
    several_answers: Repeated
    outside: dict[int, int]
    refused: int
    first_refused: str
    unread: dict[str, int]
    steps_an_epoch: int
    steps: int
    speed: float | None
    seconds: float | None
    knowledge: Knowledge | None
    warnings: list[str]
    shown: list[Shown]

    @property
    def now(self) -> AtLength:
        """What becomes of the records at the ctx_len of the settings."""
        return next(at for at in self.lengths if at.ctx_len == self.ctx_len)

    @property
    def fill(self) -> float:
        """The share of what is computed that is documents, with the settings."""
        return self.now.packed_fill if self.packing else self.now.single_fill
