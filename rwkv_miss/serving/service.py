"""What the server has: the models that can be asked for, places, the engine's thread, and the requests that are being
answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import anyio

from rwkv_miss.adapters.files import adapters_template
from rwkv_miss.config import DataOptions, ServeConfig
from rwkv_miss.data.templates import Template, find_template, settled
from rwkv_miss.data.tokenizers import Tokenizer
from rwkv_miss.errors import UserError
from rwkv_miss.generation.engine import Engine, Piece
from rwkv_miss.generation.sampling import Sampling
from rwkv_miss.serving.errors import ApiError, engine_failed, no_model, not_finite, shutting_down, too_long
from rwkv_miss.serving.places import Places
from rwkv_miss.serving.worker import Job, Worker


@dataclass(frozen=True)
class ServedModel:
    """A model that requests can name. adapter: its name in the engine; None for the base."""

    name: str
    adapter: str | None
    template: Template
    created: int = field(default_factory=lambda: int(time.time()))


class Answers:
    """The answers to one request. They end together with the request: `close` has to be called whatever happens."""

    def __init__(
        self,
        places: Places,
        worker: Worker,
        asked: Sequence[tuple[Sequence[int], Sampling]],
        adapter: str | None,
    ) -> None:
        """A place has been taken for each of them."""
        self._places, self._worker = places, worker
        self._items: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self._first: tuple[int, Piece] | None = None
        self._jobs = [
            Job(prompt, sampling, adapter, partial(self._take, i)) for i, (prompt, sampling) in enumerate(asked)
        ]
        worker.begin(self._jobs)

    async def wait(self) -> None:
        """Until the first piece is there. Raises what `pieces` raises, if that comes first."""
        self._first = await self._next()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(the answer's index, a piece of it) until all answers have ended.

        Raises:
            ApiError: the answers cannot be written to their ends.
            UserError: one of them cannot be begun.
        """
        left = len(self._jobs)
        while left:
            index, piece = self._first or await self._next()
            self._first = None
            left -= piece.finish is not None
            yield index, piece

    def fail(self, error: Exception) -> None:
        """Lets `pieces` raise the error."""
        self._items.put_nowait((0, error))

    def close(self) -> None:
        """Gives up what has not ended."""
        for job in self._jobs:
            self._worker.cancel(job)

    def _take(self, index: int, item: Piece | Exception) -> None:
        if isinstance(item, Exception) or item.finish:
            self._places.give(1)
        self._items.put_nowait((index, item))

    async def _next(self) -> tuple[int, Piece]:
        index, item = await self._items.get()
        if isinstance(item, (ApiError, UserError)):
            raise item
        if isinstance(item, Exception):
            raise engine_failed(item) from item
        if item.finish == "not_finite":
            raise not_finite()
        return index, item


class Service:
    """Call `start` in the event loop before anything else.

    Args:
        engine: of the base, without adapters.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, config: ServeConfig) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.on_failure: Callable[[], None] = lambda: None
        """Called in the event loop when the engine has failed."""
        self._engine = engine
        self.places = Places(config.max_batch, config.max_waiting)
        self._active: dict[Answers, asyncio.TimerHandle] = {}
        self._is_stopping = False
        self.models = {config.name: ServedModel(config.name, None, _template(config.template))}
        for name, folder in config.adapters().items():
            self.models[name] = self._load(name, folder)

    def start(self) -> None:
        self._worker = Worker(self._engine, self.on_failure)

    @property
    def failure(self) -> Exception | None:
        """What the engine has failed with."""
        return self._worker.failure

    def model(self, name: str) -> ServedModel:
        if name not in self.models:
            raise no_model(name, list(self.models))
        return self.models[name]

    async def ask(self, asked: Sequence[tuple[Sequence[int], Sampling]], adapter: str | None) -> Answers:
        """The answers to prompts, once there are places for them and the first piece of one is there.

        Raises:
            ApiError: the server is too busy, or as `Answers.pieces`.
            UserError: as `Answers.pieces`.
        """
        if self._is_stopping:
            raise shutting_down()
        seconds = self.config.timeout
        loop = asyncio.get_running_loop()
        limit = loop.time() + seconds
        try:
            with anyio.fail_after(seconds):
                await self.places.take(len(asked))
        except TimeoutError:
            raise too_long(seconds) from None
        answers = Answers(self.places, self._worker, asked, adapter)
        self._active[answers] = loop.call_at(limit, answers.fail, too_long(seconds))
        try:
            await answers.wait()
        except BaseException:
            self.close(answers)
            raise
        return answers

    def close(self, answers: Answers) -> None:
        if timer := self._active.pop(answers, None):
            timer.cancel()
            answers.close()

    async def load(self, name: str, folder: str) -> None:
        """Adds an adapter between two steps. Raises UserError if it cannot be served."""
        if name == self.config.name:
            raise UserError(f"{name!r} is the name of the base; choose another")
        self.models[name] = await self._worker.call(self._load, name, folder)

    async def unload(self, name: str) -> None:
        """Requests can no longer name the adapter; answers that are being written go on with it."""
        adapter = self.model(name).adapter
        if adapter is None:
            raise UserError(f"{name!r} is the base; only adapters can be unloaded")
        del self.models[name]
        await self._worker.call(self._engine.adapters.remove, adapter)

    def refuse_new(self) -> None:
        """Requests that have no place yet are told that the server shuts down; the others go on."""
        self._is_stopping = True
        self.places.refuse(shutting_down())

    def end_all(self) -> None:
        """All requests are told that the server shuts down."""
        for answers in list(self._active):
            answers.fail(shutting_down())

    def stop(self) -> None:
        self._worker.stop()

    def _load(self, name: str, folder: str) -> ServedModel:
        template = _template(self.config.template, adapters_template(folder))
        self._engine.adapters.add(name, folder)
        return ServedModel(name, name, template)


def _template(given: str | None, recorded: str | None = None) -> Template:
    """An adapter's own template, or else the one that was given."""
    return find_template(settled(DataOptions(template=None if recorded else given), recorded).template)
