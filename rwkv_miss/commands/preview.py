from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from rwkv_miss.config import PreviewConfig


def run(config: PreviewConfig) -> int:
    """Show data as the model will see them, before anything is trained: the options are those of train."""
    from rwkv_miss.previewing.page import check_page, write_page
    from rwkv_miss.previewing.preview import preview
    from rwkv_miss.previewing.terminal import print_preview

    page = Path(config.html) if config.html else None
    if page:
        check_page(page, config.overwrite)
    with Console(stderr=True).status("reading") as status:
        found = preview(config, lambda records: status.update(f"{records:,} records"))
    if page:
        write_page(page, found, config)
    if config.json:
        print(json.dumps(asdict(found)))
    else:
        print_preview(found, config, Console(markup=False, highlight=False))
    return 0
