"""`doctor` says what is true of this machine."""

from __future__ import annotations

import json

import torch

from rwkv_miss.cli import main
from rwkv_miss.ops.cpu import wkv7 as on_cpu


def test_on_this_machine(capsys):
    status = main(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["found"]["torch"].startswith(torch.__version__)
    assert facts["found"]["backend torch"] == "works"
    if not torch.cuda.is_available():
        assert facts["found"]["backend cuda"] == "no: there is no GPU"
        assert facts["chosen"] == ("torch" if on_cpu.unusable("cpu", torch.bfloat16) else "cpu")
    assert facts["is_native"] == (facts["chosen"] != "torch") and status == (0 if facts["is_native"] else 1)


def test_without_a_compiler(capsys, monkeypatch):
    monkeypatch.setattr(on_cpu, "unusable", lambda *_: "no working C++ compiler; install g++")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "no: no working C++ compiler; install g++" in out and out.split()[-1] == "torch"
