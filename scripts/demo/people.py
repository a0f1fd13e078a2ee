"""Invented people, and what the demo's two kinds of text say of them: plain English for pre-training, JSON for
fine-tuning. Names are random syllables, so a model has to copy them and cannot know them by heart."""

from __future__ import annotations

import json
import string
from collections.abc import Collection
from random import Random
from typing import NamedTuple

CITIES = (  # noqa: SIM905
    "Oslo Lima Cairo Delhi Paris Rome Quito Perth Turin Osaka Hanoi Accra Dakar Minsk Sofia Vienna Bergen Kyoto "
    "Lagos Porto Malmo Leeds Bern Tunis Havana Boston Denver Dublin Geneva Lisbon London Madrid Munich Nairobi "
    "Naples Prague Sydney Tokyo Warsaw Zagreb"
).split()
JOBS = (  # noqa: SIM905
    "nurse baker pilot cook judge farmer tailor singer painter plumber lawyer driver teacher writer barber miner "
    "guard clerk porter dentist doctor waiter sailor butcher banker chemist dancer gardener fisher florist hunter "
    "mason potter ranger roofer surgeon tutor vet weaver welder"
).split()
CODE = string.ascii_letters + string.digits + string.punctuation
SENTENCES = (
    "{name}, {age}, lives in {city} and works as a {job}.",
    "{name} is a {age} year old {job} from {city}.",
    "{name} is {age}, a {job} in {city}.",
    "The {job} {name} lives in {city} and is {age}.",
    "In {city} lives {name}, a {job}, who is {age}.",
    "At {age}, {name} works in {city} as a {job}.",
    "{name} works as a {job} in {city} at the age of {age}.",
    "A {job} from {city}, {name} is now {age}.",
    "Meet {name} from {city}: {age} years old and a {job}.",
    "{city} is home to {name}, who is {age} and a {job}.",
    "This is {name}. Home: {city}. Work: {job}. Years: {age}.",
    "We spoke to {name}, a {job} of {age} who lives in {city}.",
    "Last year the {job} {name}, now {age}, moved to {city}.",
    "The {age} year old {name} from {city} is a {job}.",
    "As a {job} in {city}, {name}, {age}, is busy.",
    "{age} years old and a {job}: that is {name} of {city}.",
)
QUESTIONS = {
    "name": ("Who is it?", "What is the name?", "Who is the {job}?", "Who lives in {city}?", "Who is {age}?"),
    "age": ("How old is {name}?", "What is the age?", "How old is the {job}?"),
    "city": ("Where does {name} live?", "Which city is it?", "Where does the {job} live?"),
    "job": ("What does {name} do?", "What is the job?", "What is the job of {name}?"),
}


class Person(NamedTuple):
    name: str
    age: str
    city: str
    job: str


def person(rng: Random, forbidden: Collection[str]) -> Person:
    """A random person; neither of the two words of the name is in `forbidden`."""
    words: list[str] = []
    while len(words) < 2:
        if (word := _word(rng).capitalize()) not in forbidden:
            words.append(word)
    return Person(" ".join(words), str(rng.randint(18, 89)), rng.choice(CITIES), rng.choice(JOBS))


def sentence(rng: Random, who: Person) -> str:
    return rng.choice(SENTENCES).format(**who._asdict())


def as_json(who: Person) -> str:
    """What the fine-tuning teaches: the fields in a fixed order, the age a number."""
    return json.dumps({**who._asdict(), "age": int(who.age)})


def look_up(rng: Random, who: Person) -> tuple[str, str]:
    """One fact of the sentence."""
    field = rng.choice(Person._fields)
    question = rng.choice(QUESTIONS[field]).format(**who._asdict())
    return f"{sentence(rng, who)} {question}", getattr(who, field)


def list_fields(rng: Random, who: Person) -> tuple[str, str]:
    """Two to four facts, in the order asked for."""
    chosen = rng.sample(Person._fields, rng.randint(2, 4))
    return f"{sentence(rng, who)} List {', '.join(chosen)}.", ", ".join(f"{f}: {getattr(who, f)}" for f in chosen)


def say_again(rng: Random, who: Person) -> tuple[str, str]:
    """The same in another sentence."""
    return f"{sentence(rng, who)} Say it in other words.", sentence(rng, who)


def repeat(rng: Random) -> tuple[str, str]:
    """A random string to copy."""
    code = "".join(rng.choices(CODE, k=rng.randint(4, 24)))
    return f"Repeat: {code}", code


def lesson(rng: Random, forbidden: Collection[str]) -> tuple[str, str]:
    """A question and its answer for pre-training. Braces and double quotes occur in `repeat` alone."""
    if rng.random() < 0.2:
        return repeat(rng)
    (teach,) = rng.choices((look_up, list_fields, say_again), (0.3, 0.5, 0.2))
    return teach(rng, person(rng, forbidden))


def _word(rng: Random) -> str:
    syllables = (rng.choice("bdflmnrstvw") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))
    return "".join(syllables) + rng.choice(("", "n", "r", "s", "l"))
