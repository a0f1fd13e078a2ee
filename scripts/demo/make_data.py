"""Writes train.jsonl (1,500 records) and heldout.jsonl (200): sentences about people, and the same as JSON.

Held out: neither the first nor the last name of anyone in heldout.jsonl occurs in train.jsonl, nor in what the
base was pre-trained on (make_base.py). Sentence patterns, cities, jobs and ages are shared.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from jsonargparse import CLI
from people import Person, as_json, person, sentence

from rwkv_miss.files import atomic_write

HERE = Path(__file__).parent


def make_data(out: Path = HERE, seed: int = 0, n_train: int = 1500, n_heldout: int = 200) -> None:
    rng = Random(seed)
    heldout = [person(rng, ()) for _ in range(n_heldout)]
    forbidden = {word for who in heldout for word in who.name.split()}
    train = [person(rng, forbidden) for _ in range(n_train)]
    _write(out / "heldout.jsonl", rng, heldout)
    _write(out / "train.jsonl", rng, train)


def heldout_names(path: Path) -> set[str]:
    """The first and last names in a heldout.jsonl."""
    answers = [json.loads(json.loads(line)["answer"]) for line in path.read_text().splitlines()]
    return {word for answer in answers for word in answer["name"].split()}


def _write(path: Path, rng: Random, people: list[Person]) -> None:
    records = ({"question": sentence(rng, who), "answer": as_json(who)} for who in people)
    with atomic_write(path) as part:
        part.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    CLI(make_data, as_positional=False)
