"""Common files and folders that no reader reads, and what the user can do instead."""

from __future__ import annotations

import os.path
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

# In the sentences FILE stands for the path and OUT for the file to make, both quoted for a shell, so that
# the commands can be pasted into one.
_TABLE = (
    'a table is not read; write one JSON object a row: python -c "import csv, json, sys; [print(json.dumps(row)) for '
    "row in csv.DictReader(open(sys.argv[1], encoding='utf-8-sig', newline=''), delimiter=chr({}))]\" FILE > OUT"
)
_DATA_SET = (
    "is a folder with a Hugging Face data set; write it as one file: "
    'python -c "import datasets, glob, sys; {}.to_json(sys.argv[2])" FILE OUT'
)
_FOLDER = "is a folder; give one file, such as all of the folder's files joined: cat FILE/*{0} > OUT"

BY_SUFFIX = {
    ".csv": _TABLE.format(ord(",")),
    ".tsv": _TABLE.format(ord("\t")),
    ".json": "a JSON array is not read; write one object a line: jq -c '.[]' FILE > OUT",
    ".parquet": (
        'Parquet is not read; write one JSON object a line: python -c "import pandas, sys; '
        "pandas.read_parquet(sys.argv[1]).to_json(sys.argv[2], orient='records', lines=True)\" FILE OUT"
    ),
    ".gz": "a compressed file is not read; unpack it first: gunzip -k FILE",
    ".zst": "a compressed file is not read; unpack it first: zstd -d FILE",
    ".xz": "a compressed file is not read; unpack it first: unxz -k FILE",
    ".zip": "an archive is not read; unpack it first: unzip FILE",
}
"""What to do with a file of a suffix that is not read."""

BY_CONTENT = {
    "dataset_dict.json": _DATA_SET.format("datasets.load_from_disk(sys.argv[1])['train']"),
    "state.json": _DATA_SET.format("datasets.load_from_disk(sys.argv[1])"),
    "*.arrow": _DATA_SET.format(
        "datasets.concatenate_datasets([datasets.Dataset.from_file(part) for part in "
        "sorted(glob.glob(sys.argv[1] + '/*.arrow'))])"
    ),
    "dataset_info.json": _DATA_SET.format("datasets.load_dataset(sys.argv[1], split='train')"),
    "*.jsonl": _FOLDER.format(".jsonl"),
    "*.txt": _FOLDER.format(".txt"),
}
"""What to do with a folder that holds a file of such a name; the first that fits counts."""

_HUB = (
    'If it is a data set of the Hugging Face hub, download it: python -c "import datasets, sys; '
    "datasets.load_dataset(sys.argv[1], split='train').to_json(sys.argv[2])\" FILE OUT"
)


def instead(path: Path, suffixes: Sequence[str]) -> str | None:
    """Why `path` cannot be read and what to do instead; None for a file that one of the readers reads, or would read
    if it were there.

    Args:
        suffixes: the suffixes that have a reader, in lower case.
    """
    suffix = path.suffix.lower()
    readable = f"give a {' or '.join(suffixes)} file, or a binidx"
    if os.path.isdir(path):
        name = next((name for name in BY_CONTENT if any(path.glob(name))), None)
        said = BY_CONTENT[name] if name else f"is a folder; {readable}"
        return _filled(said, path, path.resolve().name + (".txt" if name == "*.txt" else ".jsonl"))
    if not os.path.exists(path) and re.search(r"[*?\[]", str(path)):
        return f"a pattern of names is not expanded; join the files into one: cat {path} > all{suffix or '.jsonl'}"
    if os.path.exists(path) and not os.path.isfile(path):
        return "is a pipe or a device; copy what comes out of it to a file"
    if suffix in suffixes:
        return None
    if suffix in BY_SUFFIX and os.path.exists(path):
        return f"{suffix!r}: " + _filled(BY_SUFFIX[suffix], path, str(path.with_suffix(".jsonl")))
    if os.path.exists(path):
        return f"suffix {path.suffix!r} is not known; {readable}"
    said = f"no such file or folder; {readable}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):  # as the hub names data sets: OWNER/NAME
        said += ". " + _filled(_HUB, path, f"{path.name}.jsonl")
    return said


def _filled(sentence: str, path: Path, out: str) -> str:
    names = {"FILE": shlex.quote(str(path)), "OUT": shlex.quote(out)}
    return re.sub(r"\b(FILE|OUT)\b", lambda found: names[found[0]], sentence)
