"""What a run holds of its base in the host's memory."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.processes import run_process
from tests.training.runs import as_arguments, small_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/smaps").exists(), reason="memory is read from /proc, which Linux alone has"
    ),
]

# Prints by how much the process's resident memory, mapped files included, has risen at its peak between the imports and
# the first step, in MB.
LOADING = """
import sys
from pathlib import Path
from rwkv_miss.cli import main
from rwkv_miss.training import run

def resident(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) / 1000

def stop(*arguments, **options):
    print("rise", resident("VmHWM") - before)
    sys.exit()

run._trainer = stop
before = resident("VmRSS")
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("dtype", "precision", "quant", "share"),
    [
        (torch.bfloat16, "auto", "none", 0.7),
        (torch.float32, "bf16", "none", 1.1),
        (torch.float32, "fp32", "nf4", 0.9),
    ],
)
def test_loading_a_base(make_base, data, tmp_path, dtype, precision, quant, share):
    """Mapped weights cost nothing before they are used; those that are cast cost what they are cast to, half of the
    file. The rest of the run takes some 50 MB, with bitsandbytes and its pieces 90. Reading through the map would cost
    the file's size besides, and so would a whole model in the file's precision."""
    base = make_base(n_layer=6, n_embd=768, vocab_size=256, dtype=dtype)
    config = small_config(base, data, tmp_path / "out")
    config.precision, config.quant = precision, quant
    result = run_process([sys.executable, "-c", LOADING, "train", *as_arguments(config)], timeout=120)
    assert result.returncode == 0, result.stderr
    rise, size = float(result.stdout.split("rise")[1]), base.stat().st_size / 1e6
    assert size > 85 and rise < share * size, f"{rise:.0f} MB"


def mapped(pid: int, path: Path) -> Iterator[dict[str, int]]:
    """The figures of each part of a file that a process has mapped (proc_pid_smaps(5)), in kB."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    for part in re.findall(rf"{re.escape(str(path))}\n((?:\w+: .*\n)+)", text):
        yield {name: int(kb) for name, kb in re.findall(r"(\w+): +(\d+) kB", part)}


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_2"])
def test_ranks_share_the_mapped_base(make_base, data, start_process, tmp_path, strategy):
    """While two ranks train, what they hold of the base's file is the file, once: a page of it that is not shared is a
    copy, which is anonymous. (The ranks are looked at one after the other, so that their shares may add up to more.)"""
    base = make_base(n_layer=2, n_embd=256, vocab_size=256, dtype=torch.bfloat16)
    config = small_config(base, data, tmp_path / "out")
    config.devices, config.strategy, config.batch_size, config.max_steps = 2, strategy, 4, 1
    process = start_process([sys.executable, "-m", "rwkv_miss", "train", *as_arguments(config)])
    most, copied, ranks = 0, 0, 0
    while process.poll() is None:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if str(base).encode() in (folder / "cmdline").read_bytes():
                    found.append(list(mapped(int(folder.name), base)))
            except (OSError, ProcessLookupError):  # it has ended
                continue
        parts = [part for parts in found for part in parts]
        most = max(most, sum(part["Pss"] for part in parts))
        copied = max(copied, sum(part["Anonymous"] for part in parts))
        ranks = max(ranks, sum(map(bool, found)))
        time.sleep(0.05)
    assert process.returncode == 0, process.communicate()[1]
    size = base.stat().st_size / 1024
    assert ranks == 2 and 0.5 * size < most and copied < 0.1 * size
