"""The server as an application: its routes, who may call them, and what becomes of errors."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from rwkv_miss.errors import UserError
from rwkv_miss.serving.answering import answer_chat, answer_completion
from rwkv_miss.serving.bodies import Body, ChatRequest, CompletionRequest, LoadRequest, UnloadRequest, read
from rwkv_miss.serving.errors import ApiError
from rwkv_miss.serving.service import ServedModel, Service

_B = TypeVar("_B", bound=Body)

# The page may load and ask nothing but this server, and no other page may show it in a frame.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def create_app(service: Service, api_key: str | None = None) -> FastAPI:
    """The server as an ASGI application, which starts and stops the service.

    Args:
        api_key: what requests have to send as `Authorization: Bearer KEY`. None lets all of them in that call the
            server by a name of this machine: a page of the web could otherwise let its own name stand for it.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = FastAPI(lifespan=lifespan, openapi_url=None, exception_handlers=_HANDLERS)
    app.include_router(_pages(service))
    app.include_router(_api(service), prefix="/v1", dependencies=[Depends(_key_check(api_key))])
    if api_key is None:
        names = ["localhost", "127.0.0.1", "[::1]", service.config.host]
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=names)
    return app


def _pages(service: Service) -> APIRouter:
    """What needs no key, as it tells nothing."""
    router = APIRouter()
    page = (files("rwkv_miss.serving") / "page.html").read_text(encoding="utf-8")

    @router.get("/")
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    @router.get("/health")
    async def health() -> JSONResponse:
        is_well = service.failure is None
        return JSONResponse({"status": "ok" if is_well else "failed"}, 200 if is_well else 503)

    return router


def _api(service: Service) -> APIRouter:
    router = APIRouter()
    config = service.config

    async def body(request: Request, kind: type[_B]) -> _B:
        return await read(request, kind, config.max_body_bytes, config.timeout)

    def check_changes() -> None:
        if not config.allow_adapter_changes:
            raise ApiError(403, "adapters cannot be changed; start the server with --allow_adapter_changes")

    @router.get("/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(model, config.name) for model in service.models.values()]}

    @router.get("/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        return _card(service.model(name), config.name)

    @router.post("/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer_chat(request, service, await body(request, ChatRequest))

    @router.post("/completions")
    async def complete(request: Request) -> Response:
        return await answer_completion(request, service, await body(request, CompletionRequest))

    @router.post("/load_lora_adapter")
    async def load_adapter(request: Request) -> PlainTextResponse:
        check_changes()
        asked = await body(request, LoadRequest)
        await service.load(asked.lora_name, asked.lora_path)
        return PlainTextResponse(f"the adapter {asked.lora_name!r} is loaded")

    @router.post("/unload_lora_adapter")
    async def unload_adapter(request: Request) -> PlainTextResponse:
        check_changes()
        asked = await body(request, UnloadRequest)
        await service.unload(asked.lora_name)
        return PlainTextResponse(f"the adapter {asked.lora_name!r} is unloaded")

    return router


def _key_check(api_key: str | None) -> Callable[[Request], Coroutine[Any, Any, None]]:
    async def check(request: Request) -> None:
        if api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode(), api_key.encode())
        if scheme.lower() != "bearer" or not is_right:
            message = "the API key is missing or wrong; send the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    return check


def _card(model: ServedModel, base: str) -> dict[str, Any]:
    parent = None if model.adapter is None else base
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "rwkv-miss", "parent": parent}


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _user_error(request: Request, error: Exception) -> Response:
    return ApiError(400, str(error)).response()


async def _http_error(request: Request, error: Exception) -> Response:
    """Such as a path that is not there."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail} ({request.method} {request.url.path})"
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _our_error(request: Request, error: Exception) -> Response:
    return ApiError(500, f"the server made a mistake ({type(error).__name__}); its log has more").response()


_HANDLERS: dict[int | type[Exception], Any] = {
    ApiError: _api_error,
    UserError: _user_error,
    HTTPException: _http_error,
    ClientDisconnect: _gone,
    Exception: _our_error,
}
