"""A server in the tests' own process, on a model of random weights, and what that model writes alone."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from rwkv_miss import AdapterConfig, inject, load_model, save_adapter
from rwkv_miss.config import ServeConfig
from rwkv_miss.data.tokenizers import END, load_tokenizer
from rwkv_miss.generation.engine import Engine
from rwkv_miss.generation.sampling import Sampling
from rwkv_miss.serving.running import Server, listen
from rwkv_miss.serving.service import Service

BYTES = load_tokenizer("bytes")


def load(path: Path) -> torch.nn.Module:
    """In float64, so that the size of a batch makes no difference to what is chosen, and it never chooses the end."""
    model = load_model(path, torch.float64).eval()
    model.head.weight.data[END] = 0
    return model


def make_adapter(base: Path, folder: Path, seed: int, template: str | None = None) -> Path:
    model = load_model(base)
    inject(model, AdapterConfig(r=4))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    save_adapter(model, folder, {"template": template} if template else None)
    return folder


@dataclass
class Serving:
    """A server that runs. `http` calls it; `service` belongs to its thread."""

    url: str
    http: httpx.Client
    service: Service
    server: Server

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(f"/v1/{path}", json=body)

    def complete(self, prompt: str, model: str = "base", **body: Any) -> dict[str, Any]:
        response = self.post("completions", **{"model": model, "prompt": prompt, "temperature": 0, **body})
        assert response.status_code == 200, response.text
        return response.json()

    def error(self, path: str, status: int, **body: Any) -> dict[str, Any]:
        """The error that a request is answered with."""
        return error_of(self.post(path, **body), status)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and len(error["message"]) > 10
    return error


@contextmanager
def serving(model: torch.nn.Module, api_key: str | None = None, **settings: Any) -> Iterator[Serving]:
    config = ServeConfig(model="model.pth", tokenizer="bytes", **settings)
    service = Service(Engine(model, BYTES, prefix_cache_bytes=config.prefix_cache * 1_000_000), BYTES, config)
    with listen("127.0.0.1", 0) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        server = Server(service, api_key)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            with httpx.Client(base_url=url, timeout=60) as http:
                yield Serving(url, http, service, server)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def alone(model: torch.nn.Module, prompt: str, max_tokens: int, stop: tuple[str, ...] = ()) -> str:
    engine = Engine(model, BYTES)
    engine.add(prompt, Sampling(max_tokens=max_tokens, stop=stop))
    return "".join(piece.text for piece in engine)


def events(text: str) -> list[Any]:
    """The events of a stream, of which the last one says that it ended well."""
    *found, end, rest = text.split("\n\n")
    assert end == "data: [DONE]" and rest == ""
    return [json.loads(event.removeprefix("data: ")) for event in found]
