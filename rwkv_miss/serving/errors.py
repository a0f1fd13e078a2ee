"""What a request is told when it cannot be answered, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

# Characters of a long message's beginning, and of its end.
_HALF = 500


class ApiError(Exception):
    """A request that cannot be answered.

    Args:
        status: of HTTP.
        param: the field of the request that is wrong, such as `messages[0].content`.
        code: what programs may look for.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if len(message) > 2 * _HALF:  # what it quotes may be long
            message = f"{message[:_HALF]} [...] {message[-_HALF:]}"
        super().__init__(message)
        self.status = status
        self.headers = headers
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


# OpenAI's client sends a request again after these statuses, unless it is told that this does not help.
_NOT_AGAIN = {"x-should-retry": "false"}


def busy(waiting: int) -> ApiError:
    return ApiError(429, f"{waiting} requests wait already; try again later", code="busy", headers={"Retry-After": "1"})


def too_long(seconds: float) -> ApiError:
    message = f"the request has taken longer than the {seconds:g} s that the server's --timeout allows; ask for less"
    return ApiError(504, message, code="timeout", headers=_NOT_AGAIN)


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down")


def not_finite() -> ApiError:
    message = "the model's logits are not finite; the weights of the model, or of the adapter, are damaged"
    return ApiError(500, message, code="not_finite", headers=_NOT_AGAIN)


def engine_failed(error: BaseException) -> ApiError:
    return ApiError(
        500, f"the model has failed ({type(error).__name__}: {error})", code="engine_failed", headers=_NOT_AGAIN
    )


def no_model(name: str, there: list[str]) -> ApiError:
    return ApiError(404, f"there is no model {name!r:.100}; there are {', '.join(there)}", "model", "model_not_found")
