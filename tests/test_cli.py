"""The command line as its user meets it: wrong input above all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from rwkv_miss.cli import main
from tests.processes import run_process

GOOD = json.dumps({"question": "2 + 2?", "answer": "4"})


class Bomb:
    """Unpickling it makes the file `proof`."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


@pytest.fixture
def arguments(tmp_path, make_base):
    """`arguments(**changes)`: a training command that is right but for the changes; None leaves an option out."""

    def make(**changes: object) -> list[str]:
        data = tmp_path / "data.jsonl"
        data.write_text(GOOD + "\n")
        settings = {"data": data, "tokenizer": "bytes", "out": tmp_path / "run", "max_steps": 1, "adapter.r": 4}
        settings["ctx_len"] = 32
        if "base" not in changes:
            settings["base"] = make_base(vocab_size=256, n_layer=2)
        settings |= changes
        return ["train", *(f"--{k}={v}" for k, v in settings.items() if v is not None)]

    return make


def refused(capsys, argv: list[str], *parts: str) -> str:
    """Asserts exit status 2 and one message on stderr, without a traceback, that has the parts."""
    before = {p for p in Path(argv[-1].split("=")[-1]).parent.glob("*")}
    assert main(argv) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("rwkv-miss") and len(message.splitlines()) == 1, message
    for part in parts:
        assert part in message, message
    assert {p for p in Path(argv[-1].split("=")[-1]).parent.glob("*")} == before
    return message


def test_a_run_from_the_command_line(arguments, tmp_path, capsys):
    assert main(arguments()) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert "1 steps done" in capsys.readouterr().out


def test_names_in_square_brackets_are_shown_as_they_are(arguments, make_base, tmp_path, capsys, monkeypatch):
    """rich takes `[b]` for the beginning of bold text."""
    monkeypatch.setenv("COLUMNS", "300")
    base, run, merged = make_base(vocab_size=256), tmp_path / "[b]", tmp_path / "[i].pth"
    assert main(arguments(base=base, out=run)) == 0
    assert f"adapter in {run}/adapter" in capsys.readouterr().out
    assert main(["merge", f"--base={base}", f"--adapter={run}", f"--out={merged}"]) == 0
    assert merged.name in capsys.readouterr().out  # the title of a table, which may break the path before it


@pytest.mark.parametrize(
    "name, content, parts",
    [
        ("missing.pth", None, ["no such file"]),
        ("folder", "folder", ["is a folder"]),
        ("text.pth", b"not a checkpoint", ["text.pth", "not a PyTorch checkpoint"]),
        ("v4.pth", {"blocks.0.att.time_first": 4}, ["RWKV-4"]),
        ("v5.pth", {"blocks.0.att.ln_x.weight": 4, "blocks.0.att.gate.weight": 4}, ["RWKV-5"]),
        ("hf.pth", {"model.layers.0.attn.k_k": 4}, ["Hugging Face"]),
        ("nested.pth", "nested", ["flat state dict"]),
    ],
)
def test_a_wrong_base(arguments, tmp_path, capsys, name, content, parts):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content == "nested":
        torch.save({"model": {"emb.weight": torch.zeros(2)}}, path)
    elif isinstance(content, dict):
        torch.save({k: torch.zeros(n) for k, n in content.items()}, path)
    elif content is not None:
        path.write_bytes(content)
    refused(capsys, arguments(base=path), name, *parts)
    assert not (tmp_path / "run").exists()


def test_a_truncated_base(arguments, tmp_path, capsys, make_base):
    path = make_base(vocab_size=256)
    path.write_bytes(path.read_bytes()[:-2000])
    refused(capsys, arguments(base=path), str(path), "truncated")
    assert not (tmp_path / "run").exists()


def test_a_base_that_holds_code_is_refused_and_not_run(arguments, tmp_path, capsys):
    proof = tmp_path / "proof"
    torch.save({"emb.weight": Bomb(proof)}, tmp_path / "bomb.pth")
    refused(capsys, arguments(base=tmp_path / "bomb.pth"), "bomb.pth", "code", "nothing was executed")
    assert not proof.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "line, parts",
    [
        ("{not json", ["bad.jsonl:2", "not JSON"]),
        ('{"foo": "x"}', ["bad.jsonl:2", "'foo'", "prompt_field"]),
        ('{"question": "q", "answer": ""}', ["bad.jsonl:2", "'answer' is empty"]),
        ('{"question": "q"}', ["bad.jsonl:2"]),
        ('["question"]', ["bad.jsonl:2", "list"]),
    ],
)
def test_a_wrong_line_of_data(arguments, tmp_path, capsys, line, parts):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    refused(capsys, arguments(data=path), *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"data": "missing.jsonl"}, ["missing.jsonl"]),
        ({"data": "data.csv"}, ["data.csv: no such file"]),
        ({"tokenizer": "world"}, ["data.jsonl:1", "vocabulary of 256"]),
        ({"tokenizer": "no/such/tokenizer.json"}, ["no/such/tokenizer.json"]),
        ({"adapter.r": 0}, ["adapter.r is 0"]),
        ({"adapter.r": 33}, ["blocks.0.att.receptance", "r is 33", "32 inputs"]),
        ({"adapter.target_modules": "[att.query]"}, ["att.query", "att.receptance"]),
        ({"adapter.method": "bone"}, ["bone", "miss"]),
        ({"adapter.modules_to_save": "[norm]"}, ["adapter.modules_to_save", "norm matches no part"]),
        (
            {"adapter.method": "full", "adapter.modules_to_save": "[ln]"},
            ["modules_to_save is given, but adapter.method full"],
        ),
        ({"base": None}, ["base"]),
        ({"lr": "fast"}, ["lr", "fast"]),
        ({"lr_state": 0.1}, ["lr_state is given, but adapter.method miss has no use for it"]),
        ({"lr_state": 0, "adapter.method": "state"}, ["lr_state is 0.0; it must be above 0"]),
        ({"learning_rate": "1"}, ["learning_rate"]),
        ({"ctx_len": 2}, ["ctx_len 2 is too short"]),
        ({"wkv_backend": "cuda9"}, ["cuda9"]),
        ({"wkv_backend": "cuda"}, ["backend 'cuda' cannot be used", "'auto'"]),
        ({"strategy": "fsdp"}, ["fsdp"]),
        ({"betas": "[0.9,1]"}, ["betas are [0.9, 1.0]; both must be in [0, 1)"]),
        ({"betas": "[-0.1,0.9]"}, ["betas are [-0.1, 0.9]"]),
        ({"seed": 2**32}, ["seed is 4294967296; it must be below 2^32"]),
        ({"out": ""}, ["out is empty"]),
    ],
)
def test_a_wrong_setting(arguments, tmp_path, capsys, changes, parts):
    refused(capsys, arguments(**changes), *parts)
    assert not (tmp_path / "run").exists()


def test_an_unknown_yaml_key(arguments, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("batch_sise: 4\n")
    refused(capsys, [*arguments(), f"--config={config}"], "batch_sise")
    assert not (tmp_path / "run").exists()


def test_a_yaml_and_arguments_together(arguments, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("adapter:\n  r: 2\nseed: 7\n")
    argv = arguments(**{"adapter.r": None})
    assert main([argv[0], f"--config={config}", *argv[1:], "--seed", "8"]) == 0
    written = (tmp_path / "run" / "config.yaml").read_text()
    assert "r: 2\n" in written and "seed: 8\n" in written


def test_a_folder_that_holds_a_run(arguments, tmp_path, capsys):
    assert main(arguments()) == 0
    capsys.readouterr()
    refused(capsys, arguments(), "holds another run", "--resume auto", "--overwrite true")


def test_no_command_and_an_unknown_one(capsys):
    assert main([]) == 2
    assert main(["fine-tune"]) == 2
    assert "fine-tune" in capsys.readouterr().err


def test_merge_generate_eval_and_info_of_a_run(arguments, make_base, tmp_path, capsys):
    base = make_base(vocab_size=256, n_layer=2)
    assert main(arguments(base=base, lr=0.05)) == 0
    adapter, merged = tmp_path / "run" / "adapter", tmp_path / "merged.pth"
    assert main(["merge", f"--base={base}", f"--adapter={adapter}", f"--out={merged}"]) == 0
    assert "att.receptance" in capsys.readouterr().out

    model = ["--tokenizer=bytes", f"--data={tmp_path / 'data.jsonl'}", "--json"]
    figures = []
    for options in ([f"--model={merged}"], [f"--model={base}", f"--adapter={adapter}"], [f"--model={base}"]):
        assert main(["eval", *options, *model]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], rel=1e-5) != figures[2]["loss"]
    assert figures[0]["tokens"] == len(" 4") + 1

    assert main(["generate", f"--model={merged}", "--prompt=2 + 2?", "--tokenizer=bytes", "--max_tokens=5"]) == 0
    assert main(["info", str(merged)]) == 0
    out = capsys.readouterr().out
    assert "RWKV-7" in out and "32" in out
    assert main(["info", str(adapter)]) == 0
    assert "adapter      miss" in capsys.readouterr().out


@pytest.mark.slow
def test_a_state_from_training_to_generate_and_info(arguments, make_base, tmp_path, capsys):
    base = make_base(vocab_size=256, n_layer=2)
    changes = {"adapter.method": "state", "adapter.r": None, "lr": 5.0, "max_steps": 3, "precision": "fp32"}
    assert main(arguments(base=base, **changes)) == 0
    adapter, state, merged = tmp_path / "run" / "adapter", tmp_path / "state.pth", tmp_path / "merged.pth"
    merge = ["merge", f"--base={base}", f"--adapter={adapter}"]
    assert main([*merge, f"--out={merged}"]) == 0
    assert main([*merge, f"--out={state}", "--state_only"]) == 0
    assert "att.time_state" in capsys.readouterr().out

    answers = []
    options = [], [f"--adapter={adapter}"], [f"--state={state}"]
    for model in ([f"--model={base}", *o] for o in options):
        assert main(["generate", *model, "--prompt=2 + 2?", "--tokenizer=bytes", "--temperature=0", "--raw"]) == 0
        answers.append(capsys.readouterr().out)
    assert (
        main(["generate", f"--model={merged}", "--prompt=2 + 2?", "--tokenizer=bytes", "--temperature=0", "--raw"]) == 0
    )
    assert answers[0] != answers[1] == answers[2] == capsys.readouterr().out

    assert main(["info", str(state)]) == 0
    assert "2 layers" in capsys.readouterr().out
    assert main(["info", str(adapter)]) == 0
    out = capsys.readouterr().out
    assert "adapter      state" in out and "trained      att.time_state" in out and "linears" not in out
    asked = ["--prompt=x", "--tokenizer=bytes"]
    refused(capsys, ["generate", f"--model={merged}", f"--state={state}", *asked], "learned initial state already")
    refused(capsys, ["generate", f"--model={state}", *asked], "state.pth", "a learned initial state, not a model")
    refused(
        capsys, ["generate", f"--model={base}", f"--state={merged}", *asked], "emb.weight is not a part of the state"
    )


def test_eval_counts_right_answers(make_base, tmp_path, capsys):
    """A model that says nothing but token 0 is right where the answer is what it says: never."""
    data = tmp_path / "d.jsonl"
    data.write_text(f"{GOOD}\n{GOOD}\n")
    argv = ["eval", f"--model={make_base(vocab_size=256)}", f"--data={data}", "--tokenizer=bytes", "--max_tokens=3"]
    assert main([*argv, "--exact_match", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["records"] == 2 and figures["right"] == 0 and figures["exact_match"] == 0.0
    assert main([*argv, "--exact_match", "--limit=1", "--show=1"]) == 0
    assert "exact match: 0 of 1" in capsys.readouterr().out


@pytest.mark.parametrize("version", [6, 7])
def test_a_new_model_is_made_and_trained_on_a_binidx(tmp_path, capsys, version):
    base, prefix = tmp_path / "new.pth", tmp_path / "corpus"
    sizes = ["--n_layer=2", "--n_embd=32", "--head_size=16", "--vocab_size=256", "--dtype=fp32"]
    new = ["init", f"--version={version}", *sizes, "--low_rank.{}=8".format("maa" if version == 6 else "g")]
    assert main([*new, f"--out={base}"]) == 0
    assert f"RWKV-{version}, 2 layers of 32" in capsys.readouterr().out
    refused(capsys, [*new, f"--out={base}"], "new.pth", "exists already")
    refused(capsys, [*new, f"--out={tmp_path}/x.pth", "--head_size=20"], "n_embd 32", "head_size 20")
    refused(capsys, [*new, f"--out={tmp_path}/x.pth", f"--seed={2**64}"], "seed is 18446744073709551616")

    text = tmp_path / "data.jsonl"
    text.write_text("".join(json.dumps({"text": "tick " * n}) + "\n" for n in range(1, 9)) + GOOD + "\n")
    write = ["data", "binidx", f"--data={text}", "--tokenizer=bytes", f"--out={prefix}"]
    assert main(write) == 0
    out = capsys.readouterr().out
    assert "9 documents, 215 tokens" in out and "documents with prompts: 1;" in out
    refused(capsys, write, "corpus.bin", "exists already")

    train = ["train", f"--base={base}", f"--data={prefix}", "--tokenizer=bytes", "--adapter.r=4", "--max_steps=1"]
    assert main([*train, f"--out={tmp_path / 'run'}"]) == 0
    assert "9 records in" in capsys.readouterr().out
    evaluate = ["eval", f"--model={base}", "--tokenizer=bytes", "--json"]
    figures = []
    for data in (f"{prefix}.idx", text):
        assert main([*evaluate, f"--data={data}", "--limit=8"]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    assert figures[0] == figures[1] and figures[0]["records"] == 8
    refused(capsys, [*evaluate, f"--data={prefix}", "--exact_match"], "corpus", "no questions and answers")
    refused(
        capsys, [*train, "--text_field=q", f"--out={tmp_path / 'none'}"], "corpus: text_field can only be given for"
    )


def test_a_binidx_that_is_not_whole(arguments, tmp_path, capsys):
    (tmp_path / "data.idx").write_bytes(b"")
    refused(capsys, arguments(data=tmp_path / "data.idx"), "data.bin: no such file")
    (tmp_path / "data.bin").write_bytes(b"1234")
    refused(capsys, arguments(data=tmp_path / "data.bin"), "data.idx: begins with b''")
    assert not (tmp_path / "run").exists()


def test_a_binidx_is_written_whole_or_not_at_all(tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text(f"{GOOD}\nnot JSON\n")
    argv = ["data", "binidx", f"--data={tmp_path}/data.jsonl", "--tokenizer=bytes", f"--out={tmp_path}/corpus"]
    refused(capsys, argv, "data.jsonl:2", "not JSON")
    assert {p.name for p in tmp_path.iterdir()} == {"data.jsonl"}
    argv = ["data", "binidx", f"--data={tmp_path}/none.jsonl", "--tokenizer=bytes", f"--out={tmp_path}/new/corpus"]
    refused(capsys, argv, "none.jsonl: no such file")
    assert {p.name for p in tmp_path.iterdir()} == {"data.jsonl"}


@pytest.mark.parametrize("out", ["", "corpus.bin", "corpus.idx", "folder/", "folder/..", "."])
def test_a_prefix_that_is_none(tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text(GOOD)
    refused(capsys, ["data", "binidx", "--data=data.jsonl", "--tokenizer=bytes", f"--out={out}"], f"out is {out!r}")
    assert {p.name for p in tmp_path.iterdir()} == {"data.jsonl"}


def test_wrong_arguments_of_the_other_commands(make_base, tmp_path, capsys):
    base = make_base(vocab_size=256)
    refused(capsys, ["merge", f"--base={base}", f"--adapter={tmp_path}", f"--out={tmp_path}/m.pth"], "adapter_config")
    refused(capsys, ["generate", f"--model={base}", "--prompt=", "--raw", "--tokenizer=bytes"], "prompt is empty")
    refused(capsys, ["generate", f"--model={base}", "--prompt=x", "--tokenizer=bytes", "--top_p=2"], "top_p 2")
    refused(capsys, ["info", str(tmp_path / "none.pth")], "no such file")


def test_python_m_and_version_in_the_folder_that_a_clone_is_in(tmp_path):
    """The clone's own folder looks like a package without __init__.py, which any other package of the name beats."""
    (tmp_path / "rwkv_miss").mkdir()
    done = run_process([sys.executable, "-m", "rwkv_miss", "--version"], timeout=60, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == "rwkv-miss 0.1.0"
