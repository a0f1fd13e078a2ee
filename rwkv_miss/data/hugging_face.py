"""Data sets of Hugging Face's package `datasets`: which files hold their rows."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

from rwkv_miss.errors import UserError

BESIDE_DATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
"""Files that describe a data set and hold none of its rows."""

# OWNER/NAME, OWNER/NAME:SPLIT or OWNER/NAME:CONFIG/SPLIT.
_ON_THE_HUB = re.compile(r"(?P<set>\w[\w.-]*/[\w.-]+)(:((?P<config>[\w.-]+)/)?(?P<split>[\w.-]+))?")


def saved_files(folder: Path) -> list[Path] | None:
    """The files of a data set that `save_to_disk` wrote to the folder; None for another folder.

    Raises:
        UserError: it has several splits, or what describes it is damaged.
        OSError: a file cannot be read.
    """
    if (splits := _described(folder / "dataset_dict.json", "splits")) is not None:
        if len(splits) != 1:
            raise UserError(f"{folder}: has the splits {', '.join(splits)}; give one, such as {folder / splits[0]}")
        return saved_files(folder / splits[0])
    files = _described(folder / "state.json", "_data_files")
    return None if files is None else [folder / name for name in files]


def _described(path: Path, key: str) -> list[str] | None:
    """The names in the list `key` of a file of JSON; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())[key]
        names = [item if isinstance(item, str) else item["filename"] for item in found]
        if not names or not all(Path(name).name == name for name in names):
            raise ValueError("names that are not those of files beside it")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: does not describe a data set as save_to_disk does ({error})") from error
    return names


def is_on_the_hub(name: str) -> bool:
    """Whether a name that no file or folder has is one that a data set of the hub can have."""
    found = _ON_THE_HUB.fullmatch(name)
    return found is not None and not Path(found["set"]).parent.is_dir()


def hub_files(name: str) -> list[Path]:
    """The files of a data set of the hub, which is downloaded if it was not before: of its split `train`
    if the name has none.

    Raises:
        UserError: the package is not installed, or it cannot load the data set.
    """
    found = _ON_THE_HUB.fullmatch(name)
    assert found
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"{name}: no such file or folder; if it is a data set of the Hugging Face hub, it needs the package "
            "datasets: pip install 'rwkv-miss[datasets]'"
        )
    import datasets

    try:
        loaded = datasets.load_dataset(found["set"], found["config"], split=found["split"] or "train")
    except Exception as error:  # whatever the network, the hub and the formats of its data sets can raise
        said = str(error).strip().partition("\n")[0]
        raise UserError(f"{name}: no such file or folder here, and not loaded from the hub: {said}") from error
    return [Path(file["filename"]) for file in loaded.cache_files]
