"""Work shared out over processes: the same answers in the same order, and the first mistake."""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from itertools import count

import pytest

from rwkv_miss.data.workers import map_in_processes
from rwkv_miss.errors import RunError, UserError
from tests.processes import run_process


def work(item, factor=2):
    if item == "who":
        return os.getpid()
    if item == "tunables":
        return os.environ["GLIBC_TUNABLES"]
    if item == "end":
        os.kill(os.getpid(), signal.SIGKILL)
    if item < 0:
        raise UserError(f"item {item}")
    return item * factor


@pytest.mark.parametrize("processes", [0, 1, 3])
def test_answers_come_in_order(processes):
    assert [*map_in_processes(partial(work, factor=3), range(50), processes)] == [*range(0, 150, 3)]
    assert [*map_in_processes(work, [], processes)] == []


def test_all_processes_work():
    others = set(map_in_processes(work, ["who"] * 300, 3))
    assert len(others) == 3 and os.getpid() not in others


def test_memory_is_in_large_pages_beside_what_the_user_tunes(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    [found] = map_in_processes(work, ["tunables"], 1)
    assert found == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"


@pytest.mark.parametrize("processes", [0, 2])
def test_the_first_mistake_is_the_one_of_one_process(processes):
    answers = map_in_processes(work, [*range(20), -7, -8, *range(20)], processes)
    assert [next(answers) for _ in range(20)] == [*range(0, 40, 2)]
    with pytest.raises(UserError, match=r"^item -7$"):
        next(answers)


def test_few_items_are_taken_at_a_time():
    taken = count()
    answers = map_in_processes(work, (next(taken) for _ in range(10_000)), 2)
    assert [next(answers) for _ in range(3)] == [0, 2, 4]
    answers.close()
    assert next(taken) < 20


def test_a_process_that_is_killed_ends_the_work():
    with pytest.raises(RunError, match="ended before its time"):
        list(map_in_processes(work, [1, 2, "end", 3], 2))


@pytest.mark.slow
def test_they_end_with_the_process_that_started_them(tmp_path):
    """Also if that is killed and can close nothing."""
    code = f"""
import os, signal
from rwkv_miss.data.workers import map_in_processes
from tests.data.test_workers import work
pids = map_in_processes(work, ["who"] * 300, 2)
open({str(tmp_path / "pids")!r}, "w").write(" ".join(map(str, {{next(pids) for _ in range(200)}})))
os.kill(os.getpid(), signal.SIGKILL)
"""
    run_process([sys.executable, "-c", code], timeout=60)
    for pid in (tmp_path / "pids").read_text().split():
        for _ in range(200):
            if not os.path.exists(f"/proc/{pid}"):
                break
            time.sleep(0.02)
        assert not os.path.exists(f"/proc/{pid}")


def test_a_script_that_expects_nothing_is_not_run_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from rwkv_miss.data.workers import map_in_processes\nprint(list(map_in_processes(abs, [-1, -2], 2)))\n"
    )
    assert run_process([sys.executable, str(script)], timeout=60).stdout == "[1, 2]\n"
