"""What a record is: plain text or a conversation, as it stands in the user's file."""

from __future__ import annotations

from dataclasses import dataclass

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Record:
    """One record: `where` it came from (`path:line`) and its turns, (role, content) each, contents as written.

    A conversation has the roles system (first only), user and assistant, with at least one assistant turn; plain
    text is the single turn ("text", content). No content is empty or white space alone: readers refuse such a
    record, since an empty answer teaches a model to say nothing.

    `unread` names the fields of the record that hold something and that nothing reads; a field of a message is
    named `messages[].NAME`.
    """

    where: str
    turns: tuple[tuple[str, str], ...]
    unread: tuple[str, ...] = ()

    @property
    def is_text(self) -> bool:
        return self.turns[0][0] == "text"
