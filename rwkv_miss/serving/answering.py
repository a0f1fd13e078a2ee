"""From a request to its response: the settings of its answers, and the answers as one JSON object or as events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from rwkv_miss.generation.engine import Piece
from rwkv_miss.generation.generate import seed_of
from rwkv_miss.generation.sampling import Sampling
from rwkv_miss.serving.bodies import ChatRequest, CompletionRequest, Generation
from rwkv_miss.serving.choices import ChatChoice, Choice, CompletionChoice
from rwkv_miss.serving.errors import ApiError
from rwkv_miss.serving.prompts import chat_prompt
from rwkv_miss.serving.service import Answers, Service

_T = TypeVar("_T")

# What a completion has at most without `max_tokens`, as in OpenAI's API. A chat's answer has the server's limit.
_COMPLETION_TOKENS = 16


@dataclass(frozen=True)
class _Exchange:
    """A request, ready to be answered. `head` is what its answer, or each chunk of it, begins with; `asked` and
    `choices` are parallel: n of each prompt."""

    head: dict[str, Any]
    adapter: str | None
    asked: list[tuple[list[int], Sampling]]
    choices: Sequence[Choice]
    prompt_tokens: int
    tells_usage: bool


async def answer_chat(request: Request, service: Service, asked: ChatRequest) -> Response:
    """The response to a chat completion's request. Raises ApiError or UserError where that is wrong."""
    template = service.model(asked.model).template
    spans, begun = chat_prompt(asked, template)
    choices = [ChatChoice(i, service.tokenizer, begun, asked.logprobs) for i in range(asked.n)]
    exchange = await _exchange(
        service,
        asked,
        prompts=[spans],
        choices=choices,
        stops=template.stops,
        max_tokens=asked.max_completion_tokens or asked.max_tokens or service.config.max_tokens,
        logprobs=asked.top_logprobs if asked.logprobs else None,
        head=_head("chatcmpl", "chat.completion.chunk" if asked.stream else "chat.completion", asked),
    )
    return await _respond(request, service, exchange, asked.stream)


async def answer_completion(request: Request, service: Service, asked: CompletionRequest) -> Response:
    """As `answer_chat`, of a completion's request."""
    has_logprobs = asked.logprobs is not None
    exchange = await _exchange(
        service,
        asked,
        prompts=[[prompt] if isinstance(prompt, str) else prompt for prompt in asked.prompt],
        choices=[CompletionChoice(i, service.tokenizer, has_logprobs) for i in range(asked.n * len(asked.prompt))],
        stops=(),
        max_tokens=asked.max_tokens or min(_COMPLETION_TOKENS, service.config.max_tokens),
        logprobs=asked.logprobs,
        head=_head("cmpl", "text_completion", asked),
    )
    return await _respond(request, service, exchange, asked.stream)


def _head(prefix: str, kind: str, asked: Generation) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": asked.model}


async def _exchange(
    service: Service,
    asked: Generation,
    *,
    prompts: Sequence[Sequence[str | int]],
    choices: Sequence[Choice],
    stops: tuple[str, ...],
    max_tokens: int,
    logprobs: int | None,
    head: dict[str, Any],
) -> _Exchange:
    model = service.model(asked.model)
    if max_tokens > (most := service.config.max_tokens):
        message = f"max_tokens is {max_tokens}; the server's --max_tokens allows {most}"
        raise ApiError(400, message, "max_tokens")
    seed = secrets.randbits(63) if asked.seed is None else asked.seed
    ids = [await _tokens(service, prompt) for prompt in prompts]
    samplings = [
        Sampling(
            temperature=asked.temperature,
            top_p=asked.top_p,
            max_tokens=max_tokens,
            stop=(*asked.stop, *stops),
            seed=seed_of(seed, i),
            logprobs=logprobs,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            logit_bias=asked.logit_bias,
        )
        for i in range(asked.n)
    ]
    return _Exchange(
        head,
        model.adapter,
        [(prompt, sampling) for prompt in ids for sampling in samplings],
        choices,
        sum(map(len, ids)),
        asked.stream_options.include_usage,
    )


async def _tokens(service: Service, prompt: Sequence[str | int]) -> list[int]:
    """The token ids of a prompt that is given as such, or as texts; these are encoded in another thread, as they may be
    long."""

    def encode() -> list[int]:
        encoded = ([part] if isinstance(part, int) else service.tokenizer.encode(part) for part in prompt)
        return list(chain.from_iterable(encoded))

    ids = await asyncio.get_running_loop().run_in_executor(None, encode)
    if len(ids) > (most := service.config.max_prompt_tokens):
        message = f"the prompt has {len(ids):,} tokens; the server's --max_prompt_tokens allows {most:,}"
        raise ApiError(400, message, code="context_length_exceeded")
    return ids


async def _respond(request: Request, service: Service, exchange: _Exchange, is_streamed: bool) -> Response:
    answers = await _unless_gone(request, service.ask(exchange.asked, exchange.adapter))
    if is_streamed:
        return _EventStream(_events(exchange, answers), lambda: service.close(answers))
    try:
        return JSONResponse(await _unless_gone(request, _whole(exchange, answers)))
    finally:
        service.close(answers)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """What the work returns. Raises ClientDisconnect, and cancels the work, when the client has gone."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _EventStream(StreamingResponse):
    """Server-sent events. `close` is called whatever becomes of the connection."""

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None]) -> None:
        # The last header asks proxies to hold nothing back.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _whole(exchange: _Exchange, answers: Answers) -> dict[str, Any]:
    usage = _Usage(exchange)
    async for index, piece in answers.pieces():
        usage.add(index, piece)
        exchange.choices[index].add(piece)
    choices = [choice.whole() for choice in exchange.choices]
    return {**exchange.head, "choices": choices, "usage": usage.told()}


async def _events(exchange: _Exchange, answers: Answers) -> AsyncIterator[str]:
    """An answer as events. What goes wrong once it has begun is an event too, and the last one."""
    head, usage = exchange.head, _Usage(exchange)
    if exchange.tells_usage:
        head = {**head, "usage": None}
    try:
        async for index, piece in answers.pieces():
            usage.add(index, piece)
            yield _event({**head, "choices": [exchange.choices[index].add(piece)]})
    except ApiError as error:
        yield _event(error.body)
        return
    if exchange.tells_usage:
        yield _event({**head, "choices": [], "usage": usage.told()})
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class _Usage:
    """Counts tokens. Those of a prompt count once, however many answers it gets; as cached count what the engine had
    read before, in the mean over the prompt's answers."""

    def __init__(self, exchange: _Exchange) -> None:
        self._exchange = exchange
        self._completion_tokens = 0
        self._cached: dict[int, int] = {}

    def add(self, index: int, piece: Piece) -> None:
        self._completion_tokens += len(piece.ids)
        self._cached[index] = piece.cached_tokens

    def told(self) -> dict[str, Any]:
        prompt_tokens = self._exchange.prompt_tokens
        each = sum(len(prompt) for prompt, _ in self._exchange.asked) // prompt_tokens  # the answers of each prompt
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values()) // each},
        }
