"""`doctor` says what is true of this machine."""

from __future__ import annotations

import json

import torch

from rwkv_miss import doctor
from rwkv_miss.cli import main


def test_on_this_machine(capsys):
    status = main(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["found"]["torch"].startswith(torch.__version__)
    assert facts["found"]["backend torch"] == "works"
    if not torch.cuda.is_available():
        assert facts["found"]["backend cuda"] == "no: there is no GPU"
        assert facts["chosen"] == ("torch" if facts["found"]["backend cpu"] != "works" else "cpu")
    assert facts["is_native"] == (facts["chosen"] != "torch") and status == (0 if facts["is_native"] else 1)


def test_without_a_compiler(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "unusable", lambda *_: "no working C++ compiler; install g++")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "no: no working C++ compiler; install g++" in out and out.split()[-1] == "torch"


def test_what_works_for_one_version_alone_is_said(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "unusable", lambda op, *_: "compiling wkv6.cpp failed" if op == "wkv6" else None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "no: wkv6 compiling wkv6.cpp failed; wkv7 works" in out and out.split()[-1] == "torch"
