"""Files that are written whole or not at all, the folder of what is compiled or computed once, and locks on it.

Without torch: everything in the package may use this at once.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from rwkv_miss.errors import UserError

_log = logging.getLogger("rwkv_miss")
# A name such as BlinkDL/rwkv-7-world: an owner and a model, without the suffix of a file.
_HUB_ID = re.compile(r"[\w-]+/[\w-]+")
# A run's settings take about 2 kB, and are nested 3 deep.
_LARGEST_YAML = 100_000
_DEEPEST_YAML = 20


def cache_folder() -> Path:
    """Where compiled code and tokenised data are kept: `rwkv_miss` in the XDG cache folder, which is ~/.cache unless
    XDG_CACHE_HOME says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rwkv_miss"


def locked(path: Path) -> FileLock:
    """A context in which no other process holds the lock file `path`, whose folder is made. The lock ends with the
    process that holds it, however that ends.

    Raises:
        OSError: the folder or the lock file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """A context in which no other process has claimed the folder, which is made. The claim ends with the process, and
    leaves no file. If nothing was written to the folder, it is removed again, with those above it that were made.

    Raises:
        UserError: another process has claimed it.
        OSError: it cannot be made.
    """
    import fcntl  # not on Windows, where nothing claims a folder

    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    number = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another run is writing to it; wait for its end, or give another out") from None
        except OSError as e:  # some network file systems have no locks
            _log.warning("%s: cannot be locked (%s): see that no other run writes to it", folder, e.strerror)
        yield
    finally:
        os.close(number)
        for path in made:
            with suppress(OSError):
                path.rmdir()


def check_name(path: Path, what: str) -> None:
    """UserError if no file can have that name; `what` names its role in the message."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as e:  # too long, a link to itself, a NUL, half of a surrogate pair
        reason = e.strerror if isinstance(e, OSError) else e
        raise UserError(f"{path}: cannot be the name of {what}: {reason}") from None


def check_is_file(path: Path, what: str) -> None:
    """UserError unless `path` is a file; `what` names its role in the message."""
    check_name(path, f"a {what}")
    if path.is_dir():
        hint = ""
        if (path / "config.json").is_file():
            hint = ". This one is a Hugging Face model's: give the .pth in BlinkDL's layout that it was converted from"
        raise UserError(f"{path}: is a folder; the {what} must be a file{hint}")
    if not path.is_file():
        hint = ""
        if _HUB_ID.fullmatch(str(path)):
            hint = "; if this is the name of a model on a hub, download its .pth and give that file"
        if path.exists():
            hint = "; this is a pipe or a device: copy what comes out of it to a file"
        raise UserError(f"{path}: no such file ({what}){hint}")


def read_yaml(path: Path) -> Any:
    """What a file of settings in YAML holds: Python's own values, and nothing that grows when it is read.

    Raises:
        UserError: it is no file, no YAML, larger or nested deeper than settings are, or has aliases (`*name`), of which
            a few lines can make a value that fills the memory.
    """
    check_is_file(path, "settings")
    if (size := path.stat().st_size) > _LARGEST_YAML:
        raise UserError(f"{path}: has {size:,} bytes, too many for settings (at most {_LARGEST_YAML:,})")
    depth = 0
    try:
        text = path.read_text(encoding="utf-8")
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{path}: *{event.anchor} is an alias; write what it stands for")
            if depth > _DEEPEST_YAML:
                raise UserError(f"{path}: is nested deeper than {_DEEPEST_YAML}; settings are not")
        return yaml.safe_load(text)
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: is not UTF-8 ({e.reason}); convert the file to UTF-8") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None
    except (yaml.YAMLError, ValueError) as e:  # ValueError: a date or a number that does not exist
        if isinstance(e, UserError):
            raise
        raise UserError(f"{path}: is not YAML ({e})") from None


def part_path(path: Path) -> Path:
    """Where this process writes what is to become `path`: beside it, hidden, in the same file system."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def flush(path: Path) -> None:
    """Returns once what was written to a file is on the disk. Raises OSError if the disk refused."""
    with open(path, "rb+") as f:
        os.fsync(f.fileno())


def put_in_place(part: Path, path: Path) -> None:
    """Gives a finished file or folder `part` the name `path` at once. All of it is on the disk before it gets the name,
    so that after a power failure `path` is the old one or the new one, whole.

    Raises:
        OSError: the disk refused.
    """
    for file in [part, *part.rglob("*")]:
        if file.is_file():
            flush(file)
    os.replace(part, path)
    if os.name == "posix":  # the new name is an entry of the folder, which has to reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove(path: Path) -> None:
    """Removes a file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write a file or a folder to, which takes the name `path` at the end. After any
    failure what is new is removed, and the old file, if there was one, is as it was.

    Raises:
        OSError: the disk refused.
    """
    part = part_path(path)
    try:
        yield part
        put_in_place(part, path)
    finally:
        with suppress(OSError):  # perhaps its folder is not there
            remove(part)


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """`replacing`, for a file that the user asked for; its folder is made.

    Raises:
        UserError: the disk refused (no space, no permission).
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            yield part
    except OSError as e:
        reason = "no space left on the disk" if e.errno in (errno.ENOSPC, errno.EDQUOT) else e.strerror or e
        kept = "; the file that was there is unchanged" if path.exists() else ""
        raise UserError(f"{path}: cannot be written: {reason}{kept}") from e
