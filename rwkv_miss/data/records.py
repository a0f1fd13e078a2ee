"""What a record is: plain text, a conversation or two answers to compare, as it stands in the user's file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool: `arguments` is a JSON object as text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that the assistant may call; `parameters` is a JSON schema, empty if none is given."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


class Turn(NamedTuple):
    """What one side says. Strings are as written.

    role: system, user, assistant; tool (what a call returned); prefix and suffix (what stands before and after the
        text to fill in, which is the assistant's); text (a plain document).
    content: is empty or white space alone only where an assistant calls tools, and in a prefix or a suffix: readers
        refuse other records, since an empty answer teaches a model to say nothing. An assistant's may begin with a
        thought between <think> and </think>.
    input: of a user's turn, what an instruction is about, if the record has that in a field of its own.
    thought: of an assistant's turn, what comes before the content, if the record has that in a field of its own.
    calls: of an assistant's turn, after the content.
    learned: false for an assistant's turn that the record gives the weight 0.
    """

    role: str
    content: str
    input: str = ""
    thought: str = ""
    calls: tuple[Call, ...] = ()
    learned: bool = True


class Record(NamedTuple):
    """One record: `where` it came from (`path:line`) and its turns.

    Plain text is a single turn of the role text. A conversation has a system turn at most as its first, and an
    assistant's among the others. `rejected` is empty but for a pair of answers to compare: `turns` is then the
    conversation with the better answer, `rejected` the same conversation with the other one.

    `tools` are those that the assistant may call. `unread` names the fields of the record that hold something and that
    nothing reads; a field of a message is named `messages[].NAME`. `choices` are empty unless they were asked for and
    are there: the last turn's content is then one of them.
    """

    where: str
    turns: tuple[Turn, ...]
    unread: tuple[str, ...] = ()
    tools: tuple[Tool, ...] = ()
    rejected: tuple[Turn, ...] = ()
    choices: tuple[str, ...] = ()

    @property
    def is_text(self) -> bool:
        return self.turns[0].role == "text"
