"""Requests damaged in every way that was thought of, many at a time: each is answered or told what is wrong with it,
and none gets what another has asked for."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.serving.kit import Serving, load, make_adapter, serving

N = 500
CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b", "tool_calls": []},
    ],
    "tools": [],
    "max_completion_tokens": 5,
    "logprobs": True,
    "top_logprobs": 2,
}
COMPLETION: dict[str, Any] = {"prompt": "a", "max_tokens": 5, "logprobs": 1}
BOTH: dict[str, Any] = {
    "model": "base",
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 1,
    "stop": ["x"],
    "n": 2,
    "presence_penalty": 1,
    "logit_bias": {"65": 1},
    "stream": False,
    "stream_options": {"include_usage": True},
    "user": "me",
}
JUNK = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        -(2**64),
        10**40,
        0.5,
        -0.5,
        1e308,
        "",
        "a",
        "\0",
        "é😀\u202e",
        "base",
        "one",
    ),
    *([], [[]], {}, {"a": {}}, ["a"], [1, 2], [0], [-5], [10**9], "a" * 5000, ["a"] * 300, [["a"]], {"type": "text"}),
    *([{"role": "user", "content": "hi"}], {"role": "tool", "content": "x"}, "/etc", "..", [None], {"": None}),
]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all that a JSON value holds."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, part in inner for found in ((*path, key), *places(part, (*path, key)))]


def mutated(i: int) -> tuple[str, bytes]:
    """(a path, a body) that asks for something of its own, damaged."""
    rng = random.Random(i)
    path = rng.choice(["chat/completions", "chat/completions", "completions", "completions", "load_lora_adapter"])
    body = json.loads(json.dumps({**(CHAT if path.startswith("chat") else COMPLETION), **BOTH}))
    if path == "completions":
        body["prompt"] = f"request {i}"
    elif path == "load_lora_adapter":
        body = {"lora_name": f"adapter {i}", "lora_path": f"nowhere {i}"}
    else:
        body["messages"].append({"role": "user", "content": f"request {i}"})
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        at = body
        *outer, last = rng.choice(places(body))
        for key in outer:
            at = at[key]
        what = rng.randrange(4)
        if what == 0:
            del at[last]
        elif what == 1 and isinstance(at, dict):
            at[rng.choice(["x", "functions", "echo", "type", "content", "n", "stop", "name", "lora_name"])] = (
                rng.choice(JUNK)
            )
        else:
            at[last] = rng.choice(JUNK)
        if not body:
            break
    data = bytearray(json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass"))
    if rng.random() < 0.3:
        for _ in range(rng.randrange(1, 4)):
            where = rng.randrange(len(data))
            data[where : where + rng.choice([0, 1, 1, 9])] = rng.choice(
                [b"", b'"', b"}", b"[", b"\\ud800", b"\xff", b"\0", b"NaN"]
            )
    return path, bytes(data)


def ask(server: Serving, path: str, data: bytes) -> httpx.Response:
    return server.http.post(f"/v1/{path}", content=data, headers={"content-type": "application/json"})


def said(response: httpx.Response) -> Any:
    """What does not differ from one time to another. Log-probabilities do in their last digits."""
    if response.headers["content-type"].startswith("text/event-stream"):
        found = [json.loads(event[6:]) for event in response.text.split("\n\n")[:-2]]
        return [[choice.get("delta", choice.get("text")) for choice in event["choices"]] for event in found]
    found = response.json()
    if "error" in found:
        return found
    return [choice.get("message", choice.get("text")) for choice in found["choices"]], found["usage"][
        "completion_tokens"
    ]


@pytest.mark.slow
def test_no_damaged_request_breaks_the_server_or_gets_what_another_asked_for(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "one", 1)
    settings = {"adapter": [f"one={adapter}"], "allow_adapter_changes": True, "max_tokens": 9, "max_waiting": 10_000}
    requests = [mutated(i) for i in range(N)]
    with serving(load(base), template="g1", **settings) as server:
        with ThreadPoolExecutor(24) as pool:
            found = list(pool.map(lambda request: ask(server, *request), requests))
        statuses = [response.status_code for response in found]
        assert set(statuses) <= {200, 400, 404}, [
            requests[i] for i, s in enumerate(statuses) if s not in (200, 400, 404)
        ]
        assert 70 < statuses.count(200) < 400, statuses.count(200)
        for (path, data), response in zip(requests, found, strict=True):
            if response.status_code != 200:
                error = response.json()["error"]
                assert len(error["message"]) > 10 and len(response.content) < 2000, error
            elif path != "load_lora_adapter" and (b'"seed": 1,' in data or b'"temperature": 0,' in data):
                assert said(ask(server, path, data)) == said(response), data
        assert len({str(said(r)) for r, s in zip(found, statuses, strict=True) if s == 200}) > 70
        assert server.service.places.free == 64 and len(server.service._engine) == 0
