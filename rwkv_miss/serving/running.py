"""The server as a process: its socket, and how it ends."""

from __future__ import annotations

import asyncio
import signal
import socket
from types import FrameType

import uvicorn

from rwkv_miss.errors import RunError, UserError
from rwkv_miss.serving.app import create_app
from rwkv_miss.serving.service import Service

# Seconds that the answers which are being written have to end by themselves once the server is to stop, and then to be
# sent to slow clients.
_LAST_SECONDS, _SENDING_SECONDS = 10.0, 5


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Clients that connect to it are served once `serve` runs.

    Raises:
        UserError: the port is in use, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        why = str(error.strerror or error).partition(" (while")[0]
        raise UserError(f"cannot listen at port {port} of {host} ({why}); give another --port or --host") from None


class Server(uvicorn.Server):
    """Ends when it gets a signal, or when the engine has failed. The requests that have a place have some seconds to
    end by themselves, and are told then that it ends."""

    def __init__(self, service: Service, api_key: str | None) -> None:
        self._service = service
        super().__init__(
            uvicorn.Config(
                create_app(service, api_key),
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(_LAST_SECONDS + _SENDING_SECONDS),
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.refuse_new()
        asyncio.get_running_loop().call_later(_LAST_SECONDS, self._service.end_all)
        await super().shutdown(sockets)


def serve(service: Service, listening: socket.socket, api_key: str | None) -> int:
    """Serves until a signal comes.

    Returns:
        128 and the number of the signal.

    Raises:
        RunError: the engine has failed.
    """
    server = Server(service, api_key)
    signals: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        signals.append(signum)
        server.should_exit = True

    def fail() -> None:
        server.should_exit = True

    service.on_failure = fail
    # While it serves, uvicorn has handlers of its own, which do the same and call these at the end.
    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run([listening])
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if service.failure is not None:
        raise RunError(f"the model cannot go on ({service.failure}); with a smaller --max_batch it needs less memory")
    return 128 + signals[0]
