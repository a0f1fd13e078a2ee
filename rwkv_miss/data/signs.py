"""Signs that something is wrong with records on which a run could be trained all the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from rwkv_miss.data.copies import Copies
from rwkv_miss.data.fitting import tolerated
from rwkv_miss.data.records import Record, Turn

# Answers of fewer characters may end as they like, and all at the same length: labels, dates, titles.
_LONG = 200
# Fewer answers than this tell nothing about how answers end, and fewer copies do no harm.
_FEW = 20
# The share of answers with exactly the length of the longest that makes this length a limit. Lengths of answers that
# end by themselves spread out so much that the longest hardly ever has an equal.
_AT_A_LIMIT = 0.05

_QUESTION = re.compile(
    r"\s*(?:(?:#+ *)?(?:System|User|Human|Question|Q|Instruction|Prompt)[ \t]*:|#+ *Instruction\b|\[INST\]"
    r"|<\|im_start\|>|<\|user\|>)"
)
_ANSWER = re.compile(
    r"^[ \t]*(?:(?:#+ *)?(?:Assistant|Bot|AI|GPT|Answer|A|Response|Output)[ \t]*:|#+ *Response\b)|\[/INST\]"
    r"|<\|im_start\|>assistant|<\|assistant\|>",
    re.MULTILINE,
)
_SENTENCE_END = re.compile(r"[.!?。！？…]")
_GOES_ON = ",;:、，；："


@dataclass
class Found:
    """How many records have a sign, and where the first of them is."""

    count: int = 0
    first: str = ""

    def add(self, where: str) -> None:
        self.first = self.first or where
        self.count += 1

    def join(self, later: Found) -> None:
        self.first = self.first or later.first
        self.count += later.count


@dataclass
class Signs:
    """The signs of the records that were taken.

    like_conversation: plain text that looks like a conversation. prose: long answers that hold the end of a sentence;
    open_ends: those of them that end in the middle of one, with a letter or a comma. longest: the characters of the
    longest answer; as_long: how many answers have as many.
    """

    records: int = 0
    answers: int = 0
    like_conversation: Found = field(default_factory=Found)
    prose: int = 0
    open_ends: Found = field(default_factory=Found)
    longest: int = 0
    as_long: int = 0
    copies: Copies = field(default_factory=Copies)

    def take(self, record: Record) -> None:
        """The next record."""
        self.records += 1
        asked, answer = _question_and_answer(record)
        asked_with = asked, repr(record.tools) if record.tools else ""
        whole = asked_with, record.turns[len(asked) :], record.rejected
        self.copies.take(whole, None if record.is_text else asked_with)
        if record.is_text:
            if _QUESTION.match(answer) and _ANSWER.search(answer):
                self.like_conversation.add(record.where)
            return
        self.answers += 1
        answer = answer.strip()
        if len(answer) >= self.longest:
            self.as_long = 1 + self.as_long * (len(answer) == self.longest)
            self.longest = len(answer)
        if len(answer) >= _LONG and _SENTENCE_END.search(answer):
            self.prose += 1
            if answer[-1].isalpha() or answer[-1] in _GOES_ON:
                self.open_ends.add(record.where)

    def join(self, later: Signs) -> None:
        """Adds the signs of records that come after these."""
        self.records += later.records
        self.answers += later.answers
        self.like_conversation.join(later.like_conversation)
        self.prose += later.prose
        self.open_ends.join(later.open_ends)
        longest = max(self.longest, later.longest)
        self.as_long = self.as_long * (self.longest == longest) + later.as_long * (later.longest == longest)
        self.longest = longest
        self.copies.join(later.copies)

    def warnings(self) -> Iterator[str]:
        """A sentence for each sign that many records have: what was found, and what to do. Of plain text that looks
        like a conversation, and of 20 copies and more, many are more than are `tolerated`."""
        most = tolerated(self.records)
        if (found := self.like_conversation).count > most:
            yield (
                f"{found.count:,} of {self.records:,} records are plain text that looks like a conversation, the first "
                f"in {found.first}: all of it is learned, the questions too; give the turns as messages, or as "
                "question and answer, so that only answers are"
            )
        if (count := len(self.copies.copies())) > max(most, _FEW - 1):
            yield (
                f"{count:,} of {self.records:,} records are copies of earlier ones; remove them, unless they are meant "
                "to be learned as often as they occur"
            )
        if self.longest >= _LONG and self.as_long >= max(_FEW, _AT_A_LIMIT * self.answers):
            yield (
                f"{self.as_long:,} of {self.answers:,} answers have exactly {self.longest:,} characters, and none has "
                "more: were they cut off where the data were made? The model would learn to end there; make them whole"
            )
        if self.prose >= _FEW and 2 * (found := self.open_ends).count > self.prose:
            yield (
                f"{found.count:,} of {self.prose:,} long answers end in the middle of a sentence, the first in "
                f"{found.first}: were they cut off where the data were made? The model would learn to end there; make "
                "them whole"
            )


def _question_and_answer(record: Record) -> tuple[tuple[Turn, ...], str]:
    """What comes before the record's last answer, and that answer; of plain text nothing, and the text."""
    last = len(record.turns) - 1
    while record.turns[last].role not in ("assistant", "text"):
        last -= 1
    return record.turns[:last], record.turns[last].content
