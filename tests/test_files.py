"""Files are written whole or not at all, and are on the disk before they get their name."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from pathlib import Path

import pytest

from rwkv_miss.errors import UserError
from rwkv_miss.files import atomic_write, cache_folder, claimed, put_in_place, remove


def test_atomic_write(tmp_path):
    path = tmp_path / "new" / "file.json"
    for content in ("first", "second"):
        with atomic_write(path) as part:
            part.write_text(content)
            assert part.parent == path.parent  # a rename within one file system
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == content
        assert os.listdir(path.parent) == ["file.json"]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failed_atomic_write_leaves_what_was_there(tmp_path, error, existed):
    path = tmp_path / "file.json"
    if existed:
        path.write_text(json.dumps("old"))
    with pytest.raises(UserError if error is OSError else error), atomic_write(path) as part:
        part.write_text("half")
        raise error(28, "No space left on device")
    assert os.listdir(tmp_path) == (["file.json"] if existed else [])
    assert not existed or path.read_text() == '"old"'


def test_atomic_write_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), atomic_write(tmp_path / "file" / "x.json"):
        pass


@pytest.fixture
def disk(monkeypatch) -> list[tuple[str, str]]:
    """What is asked of the disk, in order: ("fsync", name) and ("replace", name)."""
    asked = []
    fsync, replace = os.fsync, os.replace

    def log_fsync(number: int) -> None:
        asked.append(("fsync", Path(os.readlink(f"/proc/self/fd/{number}")).name))
        fsync(number)

    def log_replace(part: Path, path: Path) -> None:
        asked.append(("replace", path.name))
        replace(part, path)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", log_replace)
    return asked


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_then_the_name_is(tmp_path, disk):
    with atomic_write(tmp_path / "file.json") as part:
        part.write_text("content")
    assert disk == [("fsync", part.name), ("replace", "file.json"), ("fsync", tmp_path.name)]


def test_every_file_of_a_folder_is_on_the_disk_before_it_gets_its_name(tmp_path, disk):
    (tmp_path / "part" / "inner").mkdir(parents=True)
    for name in ("a", "b", "inner/c"):
        (tmp_path / "part" / name).write_text(name)
    put_in_place(tmp_path / "part", tmp_path / "whole")
    assert sorted(disk[:3]) == [("fsync", "a"), ("fsync", "b"), ("fsync", "c")]
    assert disk[3:] == [("replace", "whole"), ("fsync", tmp_path.name)]
    assert (tmp_path / "whole" / "inner" / "c").read_text() == "inner/c" and not (tmp_path / "part").exists()


def test_remove(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("link", "nothing", "file"):
        remove(tmp_path / name)
    assert os.listdir(tmp_path) == ["folder"] and (tmp_path / "folder" / "inner").is_dir()
    remove(tmp_path / "folder")
    assert os.listdir(tmp_path) == []


def test_the_cache_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "rwkv_miss"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "rwkv_miss"


def test_a_folder_that_cannot_be_locked_is_claimed_with_a_warning(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    with caplog.at_level(logging.WARNING, logger="rwkv_miss"), claimed(tmp_path / "out" / "run"):
        assert (tmp_path / "out" / "run").is_dir()
    assert "cannot be locked (No locks available)" in caplog.text
    assert not (tmp_path / "out").exists()
