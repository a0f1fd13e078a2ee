"""Inputs that are wrong in every way that was thought of, and in ways that nobody has thought of: each command does its
work or ends with one message, in time. Every case that once failed is among them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from rwkv_miss.config import AdapterConfig, EvalConfig, TrainConfig
from tests.fuzz.kit import COMMANDS, READ_BY, TRAIN, answer, arguments
from tests.helpers import RunsCode

pytestmark = pytest.mark.slow

bounded = settings(
    max_examples=10,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


# Tensors of a base, a state and a checkpoint

REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "float64": lambda t: t.double(),
    "int64": lambda t: t.long(),
    "bool": lambda t: t > 0,
    "fp8": lambda t: t.to(torch.float8_e4m3fn),
    "complex": lambda t: t.to(torch.complex64),
    "conjugate": lambda t: t.to(torch.complex64).conj(),
    "negated": lambda t: torch.complex(t, t).conj().imag,
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.reshape(t.shape[0], -1).to_sparse_csr(),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "meta": lambda t: t.to("meta"),
    "nested": lambda t: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(3, 3)]),
    "expanded": lambda t: t[:1].clone().expand(2, *t.shape[1:]),
    "expanded to terabytes": lambda t: torch.ones(1, 1).expand(10**6, 10**6),
    "shape that overflows": lambda t: torch.ones(1).as_strided((2**31, 2**31), (0, 0)),
    "no rows": lambda t: t[:0],
    "a number": lambda t: t.sum(),
    "one row more": lambda t: torch.cat([t, t[:1]]),
    "one dimension more": lambda t: t[None],
    "a list": lambda t: [1.0],
    "nothing": lambda t: None,
}
ACCEPTED: dict[str, Callable[[Tensor], Any]] = {
    "parameter": torch.nn.Parameter,
    "transposed": lambda t: t.T.contiguous().T if t.ndim == 2 else t,
    "a part of a larger storage": lambda t: torch.cat([t, t])[: len(t)],
    "half": lambda t: t.half(),
    "NaN": lambda t: t * float("nan"),
    "infinite": lambda t: t + float("inf"),
    "huge": lambda t: t + 1e38,
}


@pytest.mark.slow
@pytest.mark.parametrize("change", [*REFUSED, *ACCEPTED])
@pytest.mark.parametrize("key", ["emb.weight", "blocks.1.att.r_k"])
def test_a_tensor_of_the_base(fresh, key, change):
    for command, options in READ_BY["base.pth"].items():
        fresh()
        weights = torch.load("base.pth")
        torch.save({**weights, key: (REFUSED | ACCEPTED)[change](weights[key])}, "base.pth")
        status, said = answer(arguments(command, options))
        if change in REFUSED:
            assert status == 2 and "base.pth" in said, command


@pytest.mark.parametrize("change", REFUSED)
def test_a_tensor_of_a_state(fresh, change):
    for command, options in READ_BY["state.pth"].items():
        fresh()
        state = torch.load("state.pth")
        key = "blocks.1.att.time_state"
        torch.save({**state, key: REFUSED[change](state[key])}, "state.pth")
        status, said = answer(arguments(command, options))
        assert status == 2 or command == "info", said


KEYS = {
    "of a layer far away": "blocks.99999999999999.ln1.weight",
    "of a number that no int is": f"blocks.{'9' * 5000}.ln1.weight",
    "in other digits": "blocks.٣.ln1.weight",
    "of a layer written twice": "blocks.00.ln1.weight",
    "of a layer before the first": "blocks.-1.ln1.weight",
    "empty": "",
    "long": "x" * 100_000,
    "of several lines": "a\nb\n\x1b[31m",
    "with a NUL": "blocks.0.\0",
}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", ["base.pth", "base.st"])
def test_a_key_too_many(fresh, name, key):
    for command in ("info", "train"):
        fresh()
        weights = torch.load("base.pth") | {KEYS[key]: torch.ones(16)}
        torch.save(weights, name) if name == "base.pth" else save_file(weights, name)
        status, said = answer(arguments(command, READ_BY[name][command]))
        assert status == 2 and said.isprintable()


def test_a_compressed_base_is_read(fresh):
    """Another program has unpacked and packed the zip: its bytes cannot be mapped."""
    fresh()
    shutil.unpack_archive("base.pth", "unpacked", "zip")
    before = answer(arguments("info", {"file": "base.pth"}))
    shutil.make_archive("packed", "zip", "unpacked")
    os.rename("packed.zip", "base.pth")
    assert before[0] == 0 and answer(arguments("info", {"file": "base.pth"})) == before
    assert answer(arguments("train", {}))[0] == 0


# Bytes


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A change of a few bytes somewhere, more often near the ends, where formats keep what they are."""
    kind = draw(st.sampled_from(["flip", "set", "cut", "insert", "zero", "repeat", "remove", "append"]))
    place = draw(st.one_of(st.floats(0, 1), st.integers(0, 300), st.integers(-600, -1)))
    some = draw(st.binary(min_size=1, max_size=16))

    def change(data: bytes) -> bytes:
        i = int(place * (len(data) - 1)) if isinstance(place, float) else max(min(place, len(data) - 1), -len(data))
        before, rest, n = data[:i], data[i:], len(some)
        return {
            "flip": before + bytes([rest[0] ^ 1 << some[0] % 8]) + rest[1:],
            "set": before + some[: len(rest)] + rest[n:],
            "cut": before,
            "insert": before + some + rest,
            "zero": before + bytes(min(n, len(rest))) + rest[n:],
            "repeat": before + rest[:n] + rest,
            "remove": before + rest[n:],
            "append": data + some,
        }[kind]

    return change


@pytest.mark.parametrize("name", READ_BY)
def test_damaged_bytes(fresh, name):
    @bounded
    @given(damage(), st.sampled_from([*READ_BY[name]]))
    def run(change, command):
        fresh()
        data = Path(name).read_bytes()
        Path(name).write_bytes(change(data))
        answer(arguments(command, READ_BY[name][command]))

    run()


# JSON and YAML

VALUES = {
    "null": "null",
    "NaN": "NaN",
    "infinity": "1e999",
    "a long number": "9" * 5000,
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep objects": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "text": '"x"',
    "-1": "-1",
    "2^63": str(2**63),
    "1.5": "1.5",
    "true": "true",
    "list": "[]",
    "object": "{}",
    "mixed list": '["a",1,null]',
    "half a character": r'"\ud800"',
    "NUL": r'"\u0000"',
    "colour": r'"\u001b[31m"',
}


@pytest.mark.slow
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    "name", ["adapter/adapter_config.json", "adapter/rwkv_miss.json", "run/adapter/rwkv_miss.json", "tokenizer.json"]
)
def test_a_value_in_a_json_file(fresh, name, value):
    """In place of the whole, and of every third of its values: of others with another value."""
    fresh()
    content = json.loads(Path(name).read_text())
    keys = [*content][[*VALUES].index(value) % 3 :: 3]
    texts = [json.dumps({**content, key: "HERE"}).replace('"HERE"', VALUES[value]) for key in keys]
    commands = [*READ_BY[name]]
    for i, text in enumerate([VALUES[value], *texts]):
        fresh()
        Path(name).write_text(text)
        answer(arguments(commands[i % len(commands)], READ_BY[name][commands[i % len(commands)]]))


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("line", ["{}", '{{"text": {}}}', '{{"messages": {}}}', '{{"question": "a", "answer": {}}}'])
def test_a_value_in_a_line_of_data(fresh, line, value):
    fresh()
    Path("data.jsonl").write_text(line.format(VALUES[value]) + "\n")
    for command in ("binidx", "eval"):
        answer(arguments(command, {}))


_BOMB = "a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{f'*{chr(97 + i)}, ' * 9}]\n" for i in range(9))
YAML: dict[str, bytes] = {
    "bomb": _BOMB.encode(),
    "bomb in its place": f"adapter: {{options: {{o: &a [x]}}}}\n{_BOMB}".encode(),
    "loop": b"adapter: &a {options: *a}",
    "merge of itself": b"a: &a {<<: *a}",
    "not UTF-8": b"lr: \xff\xfe",
    "UTF-16": "lr: 1".encode("utf-16"),
    "NUL": b"lr: \0",
    "control character": b"lr: \x01",
    "code": b"lr: !!python/object/apply:os.mkdir [ran]",
    "code in a class": b"adapter: {class_path: os.mkdir, init_args: {path: ran}}",
    "deep": b"lr: " + b"[" * 20_000 + b"]" * 20_000,
    "deep maps": b"lr: " + b"{a: " * 5000 + b"1" + b"}" * 5000,
    "large": b"# " + b"x" * 2_000_000,
    "list": b"- 1",
    "number": b"3",
    "empty": b"",
    "two documents": b"lr: 1\n---\nlr: 2\n",
    "cut off": b"lr: [",
    "no day": b"out: 2020-02-31",
    "not a key": b"[a]: 1",
    "number as a key": b"1: 2",
    "itself": b"config: settings.yaml",
}


@pytest.mark.parametrize("name", YAML)
def test_settings_in_yaml(fresh, name):
    for command in ("train", "eval", "resume"):
        fresh()
        if command == "resume":
            Path("run/config.yaml").write_bytes(YAML[name])
            argv = arguments("resume", {})
        else:
            Path("settings.yaml").write_bytes(YAML[name])
            argv = [*arguments(command, {}), "--config=settings.yaml"]
        status, _ = answer(argv)
        assert status == 2 or name in ("empty", "large"), command
        assert not Path("ran").exists()


# Settings

EXTREMES: list[Any] = [None, float("nan"), 1e38, -1, 2**64]
# Of these each setting gets a third.
MORE: list[Any] = [
    *(True, "", "a", "\0", "€", "a\nb", "x" * 5000, [], [None], {}, {"a": 1}, [[[1]]], 0, 2.5, 1e-320, 1e308),
    *(float("inf"), float("-inf"), [float("nan")] * 2, [0.0, 0.0], 2**31, 2**63, 10**400),
]
# What is right but takes long.
_LONG = {"max_steps", "epochs", "accumulate", "max_tokens", "warmup_steps"}
_FIELDS = [
    *(("train", f.name) for f in dataclasses.fields(TrainConfig)),
    *(("train", f"adapter.{f.name}") for f in dataclasses.fields(AdapterConfig)),
    *(("eval", f.name) for f in dataclasses.fields(EvalConfig)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "name"), _FIELDS)
def test_an_extreme_setting(fresh, command, name):
    for value in EXTREMES + MORE[_FIELDS.index((command, name)) % 3 :: 3]:
        if name in _LONG and isinstance(value, int) and value > 100:
            continue
        fresh()
        content = yaml.safe_load(Path("run.yaml").read_text()) if command == "train" else dict(COMMANDS["eval"][1])
        content |= {"json": True} if command == "eval" else {"out": "new"}
        part, _, last = name.rpartition(".")
        (content[part] if part else content)[last] = value
        Path("settings.yaml").write_text(yaml.safe_dump(content, allow_unicode=True))
        answer([command, "--config=settings.yaml"])


@pytest.mark.parametrize("lr", [1e30, 1e38])
@pytest.mark.parametrize("more", [{}, {"adapter.method": "full"}, {"adapter.method": "state"}, {"grad_clip": 0}])
def test_a_rate_that_is_far_too_high(fresh, lr, more):
    fresh()
    status, said = answer(arguments("train", {"lr": lr, "max_steps": 3, "schedule": "constant", **more}))
    assert (status == 2 and said.count("lr is 1e+38") == 1) if lr == 1e38 else status in (0, 1)


def test_more_processes_than_there_can_be(fresh):
    fresh()
    status, said = answer(arguments("train", {"devices": 100_000}))
    assert status == 2 and "devices is 100000" in said


# Names and what is there


def _socket(path: str) -> None:
    socket.socket(socket.AF_UNIX).bind(path)


PLACES: dict[str, Callable[[str], Any]] = {
    "pipe": os.mkfifo,
    "socket": _socket,
    "folder": os.mkdir,
    "empty file": lambda path: Path(path).write_bytes(b""),
    "link to itself": lambda path: os.symlink(path, path),
    "link to nothing": lambda path: os.symlink("nothing", path),
    "no end": lambda path: os.symlink("/dev/zero", path),
    "nothing in it": lambda path: os.symlink("/dev/null", path),
}
NAMES = ["y" * 300, "a/" * 3000, "", ".", "/", "-", "a\nb", "\udcff", "data.jsonl/x", "{x}", "[b]"]
_PATHS = [
    *(("train", name) for name in ("base", "data", "val_data", "tokenizer", "out", "config")),
    *(("resume", "out"), ("init", "out"), ("info", "file")),
    *(("merge", name) for name in ("base", "adapter", "out")),
    *(("eval", name) for name in ("model", "data", "tokenizer", "adapter", "config")),
    *(("generate", name) for name in ("model", "tokenizer", "adapter", "state")),
    *(("binidx", name) for name in ("data", "tokenizer", "out")),
]
_SUFFIXES = {"data": ".jsonl", "val_data": ".txt", "tokenizer": ".json", "config": ".yaml", "adapter": ""}


@pytest.mark.slow
@pytest.mark.parametrize(("command", "option"), _PATHS)
def test_a_path(fresh, command, option):
    suffix = _SUFFIXES.get(option, "" if (command, option) in (("train", "out"), ("resume", "out")) else ".pth")
    for place in PLACES.values():
        fresh()
        place(f"there{suffix}")
        answer(arguments(command, {option: f"there{suffix}"}))
    for name in NAMES:
        fresh()
        answer(arguments(command, {option: name + suffix if name not in ("", ".", "/") else name}))


@pytest.mark.parametrize("name", ["\0", "a\0.pth", "\ud800.pth"])
@pytest.mark.parametrize("option", ["base", "data", "val_data", "tokenizer", "out"])
def test_a_name_that_no_file_has(fresh, option, name):
    """A command line cannot hold it, a YAML file can."""
    fresh()
    content = yaml.safe_load(Path("run.yaml").read_text()) | {option: name}
    Path("settings.yaml").write_text(json.dumps(content))
    assert answer(["train", "--config=settings.yaml"])[0] == 2


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [name for name in READ_BY if "/" in name or "corpus" in name])
def test_what_is_inside_a_folder(fresh, name, place):
    for command, options in READ_BY[name].items():
        fresh()
        os.unlink(name)
        PLACES[place](name)
        answer(arguments(command, options))


# Checkpoints to go on from

CHECKPOINT = "run/checkpoints/step-00000001"
_MATRIX = "model.blocks.0.att.key.miss_block"
PARTS: dict[str, tuple[str | int, ...]] = {
    "all that is trained": ("state_dict",),
    "a matrix": ("state_dict", _MATRIX),
    "the optimizers": ("optimizer_states",),
    "the optimizer's state": ("optimizer_states", 0, "state"),
    "a parameter's state": ("optimizer_states", 0, "state", 3),
    "a moment": ("optimizer_states", 0, "state", 3, "exp_avg_sq"),
    "a count of steps": ("optimizer_states", 0, "state", 3, "step"),
    "the groups": ("optimizer_states", 0, "param_groups"),
    "the schedule": ("lr_schedulers",),
    "the loops": ("loops",),
    "a count": ("loops", "fit_loop", "epoch_loop.batch_progress", "total", "started"),
    "a place in the data": ("loops", "fit_loop", "state_dict", "combined_loader", 0, "batch"),
}


@pytest.mark.slow
@pytest.mark.parametrize("value", ["missing", None, {}, 3, "x", torch.ones(3, 3), torch.ones(4, 16).to_sparse()])
@pytest.mark.parametrize("part", PARTS)
def test_a_checkpoint_without_a_part(fresh, part, value):
    if part in ("a count of steps", "a count", "a place in the data") and isinstance(value, int):
        return  # as good as any
    if part in ("a count", "a place in the data") and isinstance(value, (str, dict)) and value != "x":
        return  # nothing looks for these
    fresh()
    checkpoint = torch.load(CHECKPOINT)
    *before, last = PARTS[part]
    inside = checkpoint
    for key in before:
        inside = inside[key]
    inside[last] = value
    if value == "missing":
        del inside[last]
    torch.save(checkpoint, CHECKPOINT)
    adapter = Path("run/adapter/adapter_model.safetensors").read_bytes()
    status, said = answer(arguments("resume", {}))
    assert status == 2 and CHECKPOINT in said
    assert Path("run/adapter/adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.parametrize("content", [None, 3, {}, [], {"state_dict": {}}, torch.ones(3)])
def test_a_checkpoint_that_is_something_else(fresh, content):
    fresh()
    torch.save(content, CHECKPOINT)
    status, said = answer(arguments("resume", {}))
    assert status == 2 and CHECKPOINT in said


def test_a_changed_byte_of_a_checkpoint_is_found(fresh):
    """A bit of a trained number: nothing but the sums in the zip can tell."""
    fresh()
    data = bytearray(Path(CHECKPOINT).read_bytes())
    numbers = torch.load(CHECKPOINT)["state_dict"]["model.blocks.1.att.output.miss_block"].numpy().tobytes()
    data[data.index(numbers) + 5] ^= 1
    Path(CHECKPOINT).write_bytes(data)
    status, said = answer(arguments("resume", {}))
    assert status == 2 and f"{CHECKPOINT}: is damaged" in said


def test_checkpoints_on_another_disk(fresh):
    """`checkpoints` may be a link. What is in it and not a run's own stays, and so does the link."""
    for options in ({"resume": "auto", "max_steps": 2}, {"overwrite": "true", "max_steps": 2}):
        fresh()
        os.rename("run/checkpoints", "elsewhere")
        os.symlink("../elsewhere", "run/checkpoints")
        Path("elsewhere/mine").write_text("mine")
        assert answer(arguments("train", {"out": "run", **options})) == (0, "")
        assert os.path.islink("run/checkpoints") and sorted(os.listdir("elsewhere")) == ["mine", "step-00000002"]


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_the_folder_of_a_run_is_removed(fresh, monkeypatch, logger):
    from rwkv_miss.training.reporting import Reporter

    fresh()
    report = Reporter.on_train_batch_end

    def remove_first(self, trainer, *rest):
        if trainer.global_step == 2:
            shutil.rmtree("new", ignore_errors=True)
        report(self, trainer, *rest)

    monkeypatch.setattr(Reporter, "on_train_batch_end", remove_first)
    options = {"max_steps": 4, "save_every": 1, "log_every": 1, "loggers": f"[{logger}]"}
    assert answer(arguments("train", TRAIN | options))[0] in (0, 1)


# Files that would run code


@pytest.mark.parametrize(
    ("name", "command"), [(name, command) for name in READ_BY for command in READ_BY[name] if ".json" not in name]
)
def test_a_payload_does_not_run(fresh, name, command):
    """A pickle in place of every file that a command reads: whatever its name promises, it is not unpickled."""
    fresh()
    payload = RunsCode(Path("ran"))
    torch.save({"emb.weight": torch.ones(2, 2), "more": payload}, name)
    status, _ = answer(arguments(command, READ_BY[name][command]))
    assert status == 2 and not Path("ran").exists()
    os.rename(name, "payload.pth")
    torch.load("payload.pth", weights_only=False)
    assert Path("ran").exists(), "the file of this test would not have run anything"


def test_a_payload_in_pefts_older_format_does_not_run(fresh):
    for command, options in READ_BY["adapter/adapter_config.json"].items():
        fresh()
        os.unlink("adapter/adapter_model.safetensors")
        torch.save(RunsCode(Path("ran")), "adapter/adapter_model.bin")
        status, said = answer(arguments(command, options))
        assert status == 2 and "adapter_model.bin" in said and not Path("ran").exists()
