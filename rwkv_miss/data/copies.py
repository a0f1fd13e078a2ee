"""What occurs more than once among records, and questions that have several answers."""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Copies:
    """Finds copies among what is taken one by one. Two of Python's hashes are kept of each, which are the same in a
    process and its forks alone: that some two of n different ones have the same has a probability of n^2 / 2^65, 3 in a
    million for 10 million."""

    whole: array = field(default_factory=lambda: array("q"))
    prompts: array = field(default_factory=lambda: array("q"))

    def take(self, whole: Hashable, prompt: Hashable | None) -> None:
        """The next one, and what it asks before its last answer; None for plain text."""
        self.whole.append(hash(whole))
        self.prompts.append(0 if prompt is None else hash(prompt))

    def join(self, later: Copies) -> None:
        """Adds what was taken after these."""
        self.whole.extend(later.whole)
        self.prompts.extend(later.prompts)

    def copies(self) -> np.ndarray:
        """Of each that is a copy of an earlier one, the numbers of both, int64 (copies, 2), in order; the first has
        the number 0."""
        return _repeated(np.array(self.whole, np.int64))

    def several_answers(self) -> np.ndarray:
        """Of each whose prompt an earlier one has with another answer, the numbers of both, int64 (found, 2), in order.
        Copies of earlier ones are left out."""
        whole, prompts = np.array(self.whole, np.int64), np.array(self.prompts, np.int64)
        _, first = np.unique(whole, return_index=True)
        asked = np.sort(first[prompts[first] != 0])
        return asked[_repeated(prompts[asked])]


def _repeated(values: np.ndarray) -> np.ndarray:
    """(index, index of the first equal value) of each value that is not the first of its kind, int64 (found, 2)."""
    _, first, kind = np.unique(values, return_index=True, return_inverse=True)
    firsts = first[kind]
    later = np.flatnonzero(firsts != np.arange(len(values)))
    return np.stack([later, firsts[later]], axis=1)
