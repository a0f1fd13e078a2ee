"""What becomes of requests that wait, end early, take too long or fail, and of the server after them."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
import torch

from tests.serving.kit import Serving, alone, error_of, events, load, serving

LONG = {"model": "base", "prompt": "long", "temperature": 0, "max_tokens": 4000}


@pytest.fixture
def model(base):
    return load(base)


def until(is_so: Callable[[], bool], seconds: float = 20) -> None:
    limit = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < limit, "it has not come to be so"
        time.sleep(0.01)


def counts(server: Serving) -> tuple[int, int, int]:
    """(members of the engine, free places, answers that wait)"""
    return len(server.service._engine), server.service.places.free, server.service.places.waiting


@contextmanager
def held(server: Serving) -> Iterator[None]:
    """The model waits with its next token until the block ends, so that nothing in it comes too late."""
    goes_on = threading.Event()
    step = server.service._engine.step

    def wait_and_step():
        assert goes_on.wait(60)
        return step()

    server.service._engine.step = wait_and_step
    try:
        yield
    finally:
        goes_on.set()


def leave(server: Serving, body: dict, is_there: Callable[[], bool]) -> None:
    """Sends a request, and closes the connection as soon as it is there."""
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        connection.sendall(f"{head}{len(data)}\r\n\r\n".encode() + data)
        until(is_there)


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_frees_the_places(model, stream):
    with serving(model, max_batch=3) as server:
        leave(server, LONG | {"stream": stream, "n": 3}, lambda: counts(server) == (3, 0, 0))
        until(lambda: counts(server) == (0, 3, 0))
        assert server.complete("a", max_tokens=5)["choices"][0]["text"] == alone(model, "a", 5)


def test_who_goes_away_while_waiting_is_not_written_to(model):
    with serving(model, max_batch=1) as server, ThreadPoolExecutor(2) as pool:
        with held(server):
            first = pool.submit(server.complete, **LONG | {"max_tokens": 20})
            until(lambda: counts(server) == (1, 0, 0))
            leave(server, LONG, lambda: counts(server) == (1, 0, 1))
            until(lambda: counts(server) == (1, 0, 0))
            second = pool.submit(server.complete, "a", max_tokens=3)
        assert first.result()["choices"][0]["text"] == alone(model, "long", 20)
        assert second.result()["choices"][0]["text"] == alone(model, "a", 3)
        until(lambda: counts(server) == (0, 1, 0))


def test_a_stream_that_is_cut_by_its_reader_frees_the_place(model):
    with serving(model, max_batch=1) as server:
        with server.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()  # a generator that nothing holds would close the connection already here
            next(lines)
            assert counts(server)[0] == 1
        until(lambda: counts(server) == (0, 1, 0))


def test_no_more_than_max_waiting_wait(model):
    with serving(model, max_batch=1, max_waiting=1) as server, ThreadPoolExecutor(2) as pool:
        with held(server):
            running = [pool.submit(server.complete, **LONG | {"max_tokens": 9})]
            until(lambda: counts(server) == (1, 0, 0))
            running.append(pool.submit(server.complete, **LONG | {"max_tokens": 2}))
            until(lambda: counts(server) == (1, 0, 1))
            response = server.post("completions", **LONG)
            assert error_of(response, 429)["code"] == "busy" and response.headers["Retry-After"] == "1"
        assert [found.result()["usage"]["completion_tokens"] for found in running] == [9, 2]


def test_the_time_of_a_request_is_limited(model):
    with serving(model, max_batch=1, timeout=0.5) as server:
        response = server.post("completions", **LONG | {"max_tokens": 4096})
        assert "longer than the 0.5 s" in error_of(response, 504)["message"]
        assert response.headers["x-should-retry"] == "false"
        until(lambda: counts(server) == (0, 1, 0))
        *pieces, error = server.post("completions", **LONG | {"max_tokens": 4096, "stream": True}).text.split("\n\n")[
            :-1
        ]
        assert len(pieces) > 2 and json.loads(error.removeprefix("data: "))["error"]["code"] == "timeout"
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(server.post, "completions", **LONG)
            until(lambda: counts(server)[0] == 1)
            server.service.config.timeout = 0.05
            error_of(server.post("completions", **LONG), 504)  # while it waits for a place
            assert first.result().status_code == 504
        until(lambda: counts(server) == (0, 1, 0))


def test_a_body_that_does_not_come_is_not_waited_for(model):
    with serving(model, timeout=0.3) as server:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as connection:
            connection.sendall(head + b"Content-Length: 99\r\n\r\n{")
            assert connection.recv(9999).startswith(b"HTTP/1.1 408 ")


def test_logits_that_are_not_finite_end_one_answer_alone(model):
    bad = ord("~")
    model.emb.weight.data[bad] = torch.nan
    with serving(model) as server, ThreadPoolExecutor(1) as pool:
        good = pool.submit(server.complete, "a", max_tokens=50, logit_bias={bad: -100})
        error = server.error("completions", 500, model="base", prompt="b~")
        assert "not finite" in error["message"] and error["type"] == "server_error"
        assert good.result()["usage"]["completion_tokens"] == 50
        until(lambda: counts(server) == (0, 64, 0))


def test_an_engine_that_fails_ends_all_requests_and_the_server(model):
    with serving(model, max_batch=2) as server, ThreadPoolExecutor(3) as pool:
        ended = threading.Event()
        server.service._worker._on_failure = ended.set
        running = [pool.submit(server.post, "completions", **LONG | {"stream": stream}) for stream in (False, True)]
        until(lambda: counts(server)[0] == 2)
        waiting = pool.submit(server.post, "completions", **LONG)
        until(lambda: counts(server)[2] == 1)

        def fail(*_):
            raise MemoryError("no more of it")

        server.service._engine._model.hidden = fail
        assert "MemoryError: no more of it" in error_of(running[0].result(), 500)["message"]
        last = running[1].result().text.rstrip().rpartition("\n\n")[2]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"
        error_of(waiting.result(), 500)
        assert ended.wait(20) and server.http.get("/health").status_code == 503
        server.error("completions", 500, **LONG)


@pytest.mark.parametrize("grace", [0.0, 30.0])
def test_a_server_that_stops_lets_answers_end(model, monkeypatch, grace):
    monkeypatch.setattr("rwkv_miss.serving.running._LAST_SECONDS", grace)
    body = {"model": "base", "prompt": "a", "temperature": 0, "max_tokens": 60 if grace else 4096, "stream": True}
    with serving(model, max_batch=1) as server, ThreadPoolExecutor(2) as pool:
        with held(server):
            running = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=60)
            until(lambda: counts(server)[0] == 1)
            waiting = pool.submit(httpx.post, f"{server.url}/v1/completions", json=LONG, timeout=60)
            until(lambda: counts(server)[2] == 1)
            server.server.should_exit = True
            assert error_of(waiting.result(), 503)["code"] == "shutting_down"
        text = running.result().text
    if grace:
        assert "".join(event["choices"][0]["text"] for event in events(text)) == alone(model, "a", 60)
    else:
        last = text.rstrip().rpartition("\n\n")[2]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
