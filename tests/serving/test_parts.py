"""The parts of the server alone: places, and thoughts that are told apart."""

from __future__ import annotations

import asyncio

import pytest

from rwkv_miss.serving.errors import ApiError
from rwkv_miss.serving.places import Places
from rwkv_miss.serving.thoughts import Thoughts


def test_who_finds_no_place_waits_in_order():
    async def run():
        places, order = Places(4, 9), []

        async def use(name, n):
            await places.take(n)
            order.append(name)

        await use("a", 3)
        waiting = [asyncio.ensure_future(use(name, n)) for name, n in (("b", 2), ("c", 1), ("d", 4))]
        await asyncio.sleep(0)
        assert places.waiting == 7 and order == ["a"]  # c would find a place, but b was there before
        with pytest.raises(ApiError) as caught:
            await places.take(3)
        assert caught.value.status == 429 and caught.value.headers == {"Retry-After": "1"}
        with pytest.raises(ApiError) as caught:
            await places.take(5)
        assert caught.value.status == 400
        places.give(2)
        await asyncio.gather(*waiting[:2])
        assert order == ["a", "b", "c"] and places.free == 0
        places.give(3)
        await asyncio.sleep(0)
        assert order == ["a", "b", "c"]
        places.give(1)
        await asyncio.gather(*waiting)
        assert order == ["a", "b", "c", "d"] and places.free == 0 and places.waiting == 0

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize("has_come", [False, True])
def test_who_goes_away_while_waiting_keeps_no_place(has_come):
    async def run():
        places = Places(2, 9)
        await places.take(2)
        first = asyncio.ensure_future(places.take(2))
        second = asyncio.ensure_future(places.take(1))
        await asyncio.sleep(0)
        if has_come:
            places.give(2)  # the first one's turn has come, but it is cancelled before it runs
        first.cancel()
        await asyncio.wait([first])
        if not has_come:
            places.give(2)
        await second
        assert places.free == 1 and places.waiting == 0

    asyncio.run(asyncio.wait_for(run(), 20))


def test_those_that_wait_are_told_why_they_get_no_place():
    async def run():
        places = Places(1, 9)
        await places.take(1)
        waiting = [asyncio.ensure_future(places.take(1)) for _ in range(3)]
        await asyncio.sleep(0)
        places.refuse(ApiError(503, "no"))
        assert [str(error) for error in await asyncio.gather(*waiting, return_exceptions=True)] == ["no"] * 3
        assert places.free == 0 and places.waiting == 0

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize(
    ("text", "thought", "said"),
    [
        (" <think>\n a < b\n</thin </think>\n\nThen c </think> \n", "a < b\n</thin", "Then c </think>"),
        ("<think></think>", "", ""),
        ("<think> never ends </thi", "never ends </thi", ""),
        ("  no <think>thought</think>", "", "no <think>thought</think>"),
        ("<thin", "", "<thin"),
        (" \n", "", ""),
        ("<think>\n</think>\nb\n\n c", "", "b\n\n c"),
    ],
)
def test_a_thought_is_told_apart_however_the_text_is_cut(text, thought, said):
    for width in (1, 2, 3, 7, 100):
        thoughts = Thoughts()
        found = [thoughts.push(text[i : i + width]) for i in range(0, len(text), width)] + [thoughts.finish()]
        parts = {part: "".join(new.get(part, "") for new in found) for part in ("reasoning_content", "content")}
        assert parts == {"reasoning_content": thought, "content": said}


def test_what_is_known_comes_at_once():
    thoughts = Thoughts()
    assert thoughts.push("<think>a b") == {"reasoning_content": "a b"}
    assert thoughts.push(" c</") == {"reasoning_content": " c"}
    assert thoughts.push("think> d ") == {"content": "d"}
    assert thoughts.push("e") == {"content": " e"}
