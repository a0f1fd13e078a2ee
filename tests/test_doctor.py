"""`doctor` says what is true of this machine."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch

from rwkv_miss import doctor
from rwkv_miss.cli import main
from rwkv_miss.model import quantised
from rwkv_miss.ops import fla
from rwkv_miss.ops.dispatch import IMPLEMENTATIONS


def test_on_this_machine(capsys):
    status = main(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["found"]["torch"].startswith(torch.__version__)
    assert facts["found"]["backend torch"] == "works"
    if not torch.cuda.is_available():
        assert facts["found"]["backend cuda"] == facts["found"]["backend fla"] == "no: there is no GPU"
        assert facts["chosen"] == ("torch" if facts["found"]["backend cpu"] != "works" else "cpu")
    assert facts["is_native"] == (facts["chosen"] != "torch") and status == (0 if facts["is_native"] else 1)


def test_what_combines_is_what_the_checks_let_through(capsys, monkeypatch):
    beside = ["miss", "mini", "bat", "lora", "dora", "pissa"]
    names = [*beside, "state", "full", *(f"{name}+state" for name in beside), "state+full"]
    trained = ", ".join(names + [f"{name} with modules_to_save" for name in names if name != "full"])
    ways = ["auto", "ddp"]
    for stage in (1, 2, 3):
        ways += [f"deepspeed_stage_{stage}", f"deepspeed_stage_{stage}, offload optimizer"]
    ways += ["deepspeed_stage_3, offload all"]
    expected = {f"strategy {way}": trained for way in ways}
    # Of a quantised base its linears cannot be trained, and they stay where they are.
    frozen = ", ".join(name for name in trained.split(", ") if "full" not in name)
    expected |= {f"strategy {way}, quant int8 or nf4": frozen for way in ways if "all" not in way}
    assert dict(doctor.combinations()) == expected | {"precision": "bf16, fp32 (fp16 is for files)"}
    said = dict(doctor.shortened([line for line in doctor.combinations() if "quant" not in line[0]]))
    assert (
        said["can be trained"] == ", ".join(n for n in names if n != "full") + ", each also with modules_to_save; full"
    )
    assert said["  by"].split("; ") == [f"strategy {way}" for way in ways]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    assert dict(doctor.combinations())["strategy ddp, quant int8 or nf4"] == "no: bitsandbytes is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    without = dict(doctor.combinations())
    assert without["strategy ddp"] == trained
    assert without["strategy deepspeed_stage_3, offload all"] == "no: deepspeed is not installed"
    main(["doctor"])
    assert "no: deepspeed is not installed" in capsys.readouterr().out


def test_quantised_bases_on_this_machine(monkeypatch):
    cpu = torch.device("cpu")
    assert doctor._quant_works("nf4", cpu) == doctor._quant_works("int8", cpu) == "works on cpu in bf16, fp32"
    monkeypatch.setattr(quantised, "_bitsandbytes", lambda: SimpleNamespace())
    assert doctor._quant_works("nf4", cpu).startswith("no: AttributeError: ")


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


def test_a_driver_that_torch_cannot_use_is_told(capsys, monkeypatch):
    """torch counts GPUs even if it cannot use the driver. Commands then run on the CPU."""

    def fail(_):
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    main(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert "driver on your system is too old (found version 11040)" in facts["found"]["GPU"]
    assert facts["found"]["backend cuda"] == facts["found"]["backend fla"] == "no: torch cannot use the GPU"
    assert facts["chosen"] in ("cpu", "torch")


def gpu_of_amd(monkeypatch) -> None:
    properties = SimpleNamespace(name="MI300X", gcnArchName="gfx942", total_memory=192 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.version, "hip", "6.4")


@pytest.mark.parametrize(("reason", "chosen", "status"), [(None, "fla", 0), ("fla-core is not installed", "torch", 1)])
def test_on_a_gpu_of_amd(reason, chosen, status, capsys, monkeypatch):
    gpu_of_amd(monkeypatch)
    monkeypatch.setattr(fla, "functions_or_reason", lambda: (None, reason))
    assert main(["doctor", "--json"]) == status
    facts = json.loads(capsys.readouterr().out)
    assert facts["chosen"] == chosen and facts["is_native"] == (status == 0)
    assert facts["found"]["GPU 0"] == "MI300X, gfx942, 192 GiB"
    assert facts["found"]["backend cuda"] == "no: this torch is built for AMD's ROCm"
    assert facts["found"]["backend fla"] == (f"no: {reason}" if reason else "works")


def test_an_intel_gpu_is_named_but_commands_run_on_the_cpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda _: "Arc B580")
    intels = dataclasses.replace(
        IMPLEMENTATIONS["fla"], unusable=lambda op, device, *_: None if device.type == "xpu" else "not Intel's"
    )
    monkeypatch.setitem(IMPLEMENTATIONS, "fla", intels)
    main(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["found"]["GPU xpu:0"] == "Arc B580" and "GPU" not in facts["found"]
    assert facts["found"]["backend fla"] == "works" and facts["chosen"] in ("cpu", "torch")
