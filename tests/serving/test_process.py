"""`rwkv-miss serve` as a process, and what keeps it from starting."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import sys
import time

import httpx
import openai
import pytest

from rwkv_miss import load_adapter, load_model
from rwkv_miss.cli import main
from rwkv_miss.generation.engine import Engine
from rwkv_miss.generation.sampling import Sampling
from tests.processes import free_port
from tests.serving.kit import BYTES, events, make_adapter

N, N_TOKENS, PLACES = 200, 12, 24
# What is chosen must not hang on roundings, which differ with the size of the batch.
MARGIN = 1e-4


def wait_for(url: str, process) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise AssertionError(process.communicate())
        try:
            assert httpx.get(f"{url}/health").status_code == 200
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError("the server has not come up")


def answers_alone(model, prompts: list[str]) -> dict[str, str]:
    """The texts of those prompts at whose every token the likeliest one is so by far."""
    found = {}
    for prompt in prompts:
        engine = Engine(model, BYTES)
        engine.add(prompt, Sampling(max_tokens=N_TOKENS, logprobs=2))
        pieces = list(engine)
        tops = [told.top for piece in pieces for told in piece.logprobs]
        if min(first[1] - second[1] for first, second in tops) > MARGIN:
            found[prompt] = "".join(piece.text for piece in pieces)
    return found


@pytest.mark.slow
def test_two_hundred_at_a_time_of_whom_many_leave(base, tmp_path, start_process):
    folder = make_adapter(base, tmp_path / "one", 1)
    port = free_port()
    options = {"tokenizer": "bytes", "port": port, "max_batch": PLACES, "max_waiting": N, "max_tokens": 2000}
    command = [sys.executable, "-m", "rwkv_miss", "serve", f"--model={base}", f"--adapter=one={folder}"]
    process = start_process([*command, *(f"--{name}={value}" for name, value in options.items())])
    rng = random.Random(0)
    texts = {
        name: answers_alone(model, ["".join(rng.choices("abcdefghij", k=9)) for _ in range(60)])
        for name, model in (("base", load_model(base)), ("one", load_adapter(load_model(base), folder)))
    }
    url = f"http://127.0.0.1:{port}"
    wait_for(url, process)
    asked = [(name, prompt, text) for name, found in texts.items() for prompt, text in found.items()]
    asked = [asked[i % len(asked)] for i in range(N)]
    rng.shuffle(asked)
    assert len({text for _, _, text in asked}) > 90

    async def ask(client: httpx.AsyncClient, i: int) -> bool:
        """Whether the answer was read to its end, and was right."""
        name, prompt, text = asked[i]
        body = {"model": name, "prompt": prompt, "temperature": 0, "max_tokens": N_TOKENS}
        if i % 4 == 0:  # leaves at once, or in the middle of a long answer
            body |= {"max_tokens": 2000, "stream": i % 8 == 0}
            try:
                async with client.stream("POST", "/v1/completions", json=body, timeout=1) as response:
                    await anext(response.aiter_lines())
            except httpx.TimeoutException:
                pass
            return False
        if i % 4 == 1:
            response = await client.post("/v1/completions", json=body | {"stream": True})
            assert "".join(event["choices"][0]["text"] for event in events(response.text)) == text
        else:
            response = await client.post("/v1/completions", json=body)
            assert response.json()["choices"][0]["text"] == text, response.text
        return True

    async def ask_all() -> int:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            found = await asyncio.gather(*(ask(client, i) for i in range(N)))
            # A request that takes every place: it waits for ever if one has not been given back.
            body = {"model": "one", "prompt": asked[0][1], "n": PLACES, "max_tokens": 2}
            assert len((await client.post("/v1/completions", json=body)).json()["choices"]) == PLACES
            return sum(found)

    assert asyncio.run(ask_all()) == N * 3 // 4

    with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["base", "one"]
        said = client.chat.completions.create(
            model="one", messages=[{"role": "user", "content": "a"}], n=2, max_tokens=4, logprobs=True, stop="\n\n"
        )
        assert len(said.choices) == 2 and said.choices[0].logprobs.content
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="two", messages=[{"role": "user", "content": "a"}])
        body = {"model": "base", "prompt": "a", "max_tokens": 50, "temperature": 0}
        chunks = iter(client.completions.create(**body, stream=True))
        first = next(chunks)
        process.send_signal(signal.SIGTERM)
        text = first.choices[0].text + "".join(chunk.choices[0].text for chunk in chunks)
    engine = Engine(load_model(base), BYTES)
    engine.add("a", Sampling(max_tokens=50))
    assert text == "".join(piece.text for piece in engine)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in said, said
    assert f"serving base, one at {url}" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adapter": "one"}, "adapter is 'one'; give it as NAME=FOLDER"),
        ({"adapter": "base=x"}, "the name 'base' is given twice"),
        (
            {"host": "0.0.0.0"},
            "host is '0.0.0.0', which other machines may reach; give a key in a file: --api_key_file",
        ),
        ({"host": "example.org"}, "--api_key_file"),
        ({"host": "0.0.0.0", "api_key_file": "nowhere"}, "api_key_file 'nowhere': cannot be read"),
        ({"api_key_file": "empty"}, "api_key_file 'empty': holds no key"),
        ({"port": 0}, "port is 0"),
        ({"max_batch": 0, "timeout": -1}, "max_batch is 0; it must be at least 1; timeout is -1"),
        ({"template": "nothing"}, "there is no template 'nothing'"),
        ({"adapter": "one=nowhere"}, "nowhere"),
        ({"model": "nowhere.pth"}, "nowhere.pth"),
    ],
)
def test_what_is_told_before_it_starts(base, tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("\n")
    given = {"model": base, "tokenizer": "bytes", "port": free_port(), **options}
    assert main(["serve", *(f"--{name}={value}" for name, value in given.items())]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1


def test_a_port_in_use_is_told_before_the_model_is_looked_at(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--model=nowhere.pth", "--tokenizer=bytes", f"--port={port}"]) == 2
    assert (
        f"cannot listen at port {port} of 127.0.0.1 (Address already in use); give another" in capsys.readouterr().err
    )


def test_a_package_that_is_missing(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve", "--model=nowhere.pth", "--tokenizer=bytes"]) == 2
    assert "fastapi is not installed; install it: pip install 'rwkv-miss[serve]'" in capsys.readouterr().err


def test_adapters_are_given_one_by_one():
    from rwkv_miss.cli import _parse

    options, _ = _parse(["serve", "--model=m", "--tokenizer=world", "--adapter", "a=x/y", "--adapter=b=z w"])
    assert options.adapter == ["a=x/y", "b=z w"]
