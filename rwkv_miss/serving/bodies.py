"""What requests may hold, and how it is read: OpenAI's parameters, as far as they are supported. Others are refused if
they would change the answer, and let through if they change nothing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import anyio
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import Request

from rwkv_miss.data.records import Call, Tool, Turn
from rwkv_miss.generation.sampling import MOST_LOGPROBS
from rwkv_miss.serving.errors import ApiError

MOST_STOPS, LONGEST_STOP = 16, 200
"""Stop strings of a request, and characters of each: every token's text is compared with all of them."""
MOST_CHOICES = 128
"""Prompts of a request, and answers to each."""
MOST_BIASES = 1000
"""Tokens of a request's `logit_bias`."""

_B = TypeVar("_B", bound="Body")


class Body(BaseModel):
    """Fields that are null count as absent. Any other field is refused, unless it is named here."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    CHANGES_NOTHING: ClassVar[frozenset[str]] = frozenset()
    """Fields without an effect on the answer, whatever they hold."""
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Fields that are not supported, and the values with which they have no effect."""

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise ValueError("must be an object")
        there = {name: value for name, value in given.items() if value is not None}
        for name, value in there.items():
            if name in cls.model_fields or name in cls.CHANGES_NOTHING or value in cls.NEUTRAL.get(name, ()):
                continue
            message = f"{name} is {json.dumps(value):.40}, which this server does not support; leave it out"
            raise ApiError(400, message, name, "unsupported_parameter")
        return there


def _joined_parts(content: Any) -> Any:
    """The text of a content in parts."""
    if not isinstance(content, list):
        return content
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"part {i} is of type {kind!r:.40}; the model reads only text")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"part {i} has no text")
    return "".join(part["text"] for part in content)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> Any:
    """One prompt or several, each as text or token ids, as a list of them."""
    is_one = isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int))
    return [value] if is_one else value


def _by_id(value: Any) -> Any:
    """Biases by token ids, which JSON has as strings."""
    if not isinstance(value, dict):
        return value
    if wrong := [key for key in value if not (key.isascii() and key.isdecimal() and len(key) < 10)]:
        raise ValueError(f"{wrong[0]!r:.40} is no token id")
    return {int(key): bias for key, bias in value.items()}


def _object(text: str) -> str:
    try:
        is_object = isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise ValueError("must be a JSON object as a string")
    return text


class _Named(Body):
    name: str = Field(min_length=1)


class _CalledFunction(_Named):
    arguments: Annotated[str, BeforeValidator(lambda value: _object(value) if isinstance(value, str) else value)]


class _ToolCall(Body):
    CHANGES_NOTHING = frozenset({"id", "index"})

    type: Literal["function"] = "function"
    function: _CalledFunction


class _Function(_Named):
    CHANGES_NOTHING = frozenset({"strict"})

    description: str = ""
    parameters: dict[str, Any] = {}


class _Tool(Body):
    type: Literal["function"] = "function"
    function: _Function

    def tool(self) -> Tool:
        return Tool(self.function.name, self.function.description, self.function.parameters)


class Message(Body):
    CHANGES_NOTHING = frozenset({"name", "tool_call_id", "annotations", "refusal", "reasoning"})

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_joined_parts)] = ""
    reasoning_content: str = ""
    tool_calls: list[_ToolCall] = []

    def turn(self) -> Turn:
        calls = tuple(Call(call.function.name, call.function.arguments) for call in self.tool_calls)
        role = "system" if self.role == "developer" else self.role
        return Turn(role, self.content, thought=self.reasoning_content, calls=calls)


class _StreamOptions(Body):
    CHANGES_NOTHING = frozenset({"include_obfuscation"})

    include_usage: bool = False


class Generation(Body):
    """What both kinds of requests have. `temperature` and `top_p` are by default those of `rwkv-miss generate`."""

    CHANGES_NOTHING = frozenset(
        {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prediction"}
    )
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "parallel_tool_calls": (True,),
        "functions": ([],),
    }

    model: str
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(0.5, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]],
        BeforeValidator(_listed),
        Field(max_length=MOST_STOPS),
    ] = []
    seed: int | None = None
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[
        dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_by_id), Field(max_length=MOST_BIASES)
    ] = {}
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()


class ChatRequest(Generation):
    messages: list[Message] = Field(min_length=1)
    tools: list[_Tool] = []
    tool_choice: Literal["auto", "none"] = "auto"
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_LOGPROBS)


class CompletionRequest(Generation):
    prompt: Annotated[
        list[str] | list[list[int]], BeforeValidator(_prompts), Field(min_length=1, max_length=MOST_CHOICES)
    ]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)


class LoadRequest(Body):
    lora_name: str = Field(min_length=1, max_length=100)
    lora_path: str = Field(min_length=1)


class UnloadRequest(Body):
    CHANGES_NOTHING = frozenset({"lora_int_id"})

    lora_name: str


# Bytes beyond the limit that are read without being kept: a client that is answered, and let go of, while it sends may
# not get the answer.
_PASSED_OVER = 64 * 2**20


async def read(request: Request, kind: type[_B], most_bytes: int, seconds: float) -> _B:
    """The body of a request, of which no more than `most_bytes` is kept and which is read for at most `seconds`.

    Raises:
        ApiError: it is too long, no JSON, or not of this kind: the message names the field.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # A page of another site may send other types without asking first.
        raise ApiError(415, "the body must be JSON; send the header Content-Type: application/json")
    try:
        with anyio.fail_after(seconds):
            data = b"".join([chunk async for chunk in _limited(request, most_bytes)])
    except TimeoutError:
        raise ApiError(408, f"the body has not come within {seconds:g} s", headers={"Connection": "close"}) from None
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = _path(first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{param or 'the body'}: {message}", param or None) from None


async def _limited(request: Request, most_bytes: int) -> AsyncIterator[bytes]:
    too_large = ApiError(
        413,
        f"the body is larger than the {most_bytes:,} bytes that the server's --max_body_bytes allows",
        code="body_too_large",
        headers={"Connection": "close"},
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > most_bytes + _PASSED_OVER:
        raise too_large
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > most_bytes + _PASSED_OVER:
            raise too_large
        if size <= most_bytes:
            yield chunk
    if size > most_bytes:
        raise too_large


def _path(location: tuple[int | str, ...]) -> str:
    """`("messages", 0, "content")` as `messages[0].content`. Names of types, which a choice between them adds, are
    left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif "[" not in part and part != "str":
            path += f".{part}" if path else part
    return path
