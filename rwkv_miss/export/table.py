"""The tables of the targets: the file formats that a model, or an adapter alone, can be written to."""

from __future__ import annotations

from pathlib import Path

from rwkv_miss.errors import UserError
from rwkv_miss.export import gguf_adapter, gguf_model, hf, peft_lora, pth, rwkv_cpp, st, st_lora
from rwkv_miss.export.target import AdapterTarget, Target
from rwkv_miss.files import check_name

TARGETS: dict[str, Target] = {
    "pth": pth.TARGET,
    "gguf": gguf_model.TARGET,
    "st": st.TARGET,
    "hf": hf.TARGET,
    "rwkv.cpp": rwkv_cpp.TARGET,
}
ADAPTER_TARGETS: dict[str, AdapterTarget] = {
    "gguf-lora": gguf_adapter.TARGET,
    "st-lora": st_lora.TARGET,
    "peft-lora": peft_lora.TARGET,
}


def target_of(path: Path) -> Target:
    """The target of a merge whose files are named like `path`.

    Raises:
        UserError: there is none.
    """
    check_name(path, "a file")
    plain = [target for target in TARGETS.values() if not target.dtypes]
    for target in plain:
        if path.name.endswith(target.suffix):
            return target
    suffixes = " or ".join(target.suffix for target in plain)
    raise UserError(f"{path}: a model is written as {suffixes}; give a name that ends so")
