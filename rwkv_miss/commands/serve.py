from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from rwkv_miss.config import ServeConfig
from rwkv_miss.errors import UserError

_log = logging.getLogger("rwkv_miss")


def run(config: ServeConfig) -> int:
    """Serve a model, and any number of adapters on it, by OpenAI's HTTP API, with a page to try them."""
    if problems := config.problems():
        raise UserError("; ".join(problems))
    if missing := [name for name in ("fastapi", "uvicorn") if not importlib.util.find_spec(name)]:
        raise UserError(f"{missing[0]} is not installed; install it: pip install 'rwkv-miss[serve]'")
    from rwkv_miss.commands.model import load
    from rwkv_miss.data.tokenizers import load_tokenizer
    from rwkv_miss.generation.engine import Engine
    from rwkv_miss.serving.running import listen, serve
    from rwkv_miss.serving.service import Service

    api_key = _read_key(config.api_key_file) if config.api_key_file else None
    with listen(config.host, config.port) as socket:
        tokenizer = load_tokenizer(config.tokenizer)
        model = load(config.model, None, config.dtype, config.quant, config.quant_skip)
        engine = Engine(model, tokenizer, prefix_cache_bytes=config.prefix_cache * 1_000_000)
        service = Service(engine, tokenizer, config)
        host = f"[{config.host}]" if ":" in config.host else config.host
        _log.info("serving %s at http://%s:%d", ", ".join(service.models), host, config.port)
        return serve(service, socket, api_key)


def _read_key(given: str) -> str:
    try:
        key = Path(given).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"api_key_file {given!r}: cannot be read ({error})") from error
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"api_key_file {given!r}: holds no key; write one line of ASCII characters without spaces")
    return key
