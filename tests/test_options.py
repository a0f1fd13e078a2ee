"""Parsing of the command line: wrong options get a suggestion, and values are taken as they were typed."""

from __future__ import annotations

import pytest

from rwkv_miss.cli import _parse, main

TRAIN = ["train", "--base=b.pth", "--data=d.txt", "--tokenizer=bytes", "--out=o"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--r", "8"], "rwkv-miss: there is no option --r; did you mean --adapter.r?"),
        (["--learning_rate", "1e-4"], "there is no option --learning_rate; did you mean --lr?"),
        (["--batch-size=4"], "there is no option --batch-size; did you mean --batch_size?"),
        (["--per_device_train_batch_size=4"], "did you mean --batch_size?"),
        (["--adaptr.r=4"], "did you mean --adapter.r or "),
        (["--xyzzy", "8"], "there is no option --xyzzy; --help lists the options"),
        (["--over", "true"], "there is no option --over; did you mean --overwrite or "),
    ],
)
def test_an_option_that_there_is_not(capsys, arguments, said):
    """Abbreviations are not accepted: --r would be --resume."""
    assert main([*TRAIN, *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "there is no command 'trian'; did you mean train?"),
        (["talk"], "there is no command 'talk'; there are init, data binidx, train, plan"),
        (["eval", "--addapter=x"], "did you mean --adapter?"),
        (["data", "binidx", "--output=x"], "did you mean --out?"),
    ],
)
def test_other_commands(capsys, arguments, said):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["target_modules", "modules_to_save"])
@pytest.mark.parametrize("form", [["{}", "att.key"], ["{}=att.key"], ["{}=[att.key]"], ["{}", "[att.key]"]])
def test_one_name_is_a_list_of_it(name, form):
    options, _ = _parse([*TRAIN, *(part.format(f"--adapter.{name}") for part in form)])
    assert options.adapter[name] == ["att.key"]


@pytest.mark.parametrize("text", [r".*[.]att\.(key|value)", "(att|ffn).*", "[ab].*", "all-linear", "blocks.0.*"])
@pytest.mark.parametrize("name", ["target_modules", "exclude_modules"])
def test_what_is_no_plain_name_is_a_regular_expression(name, text):
    for form in ([f"--adapter.{name}", text], [f"--adapter.{name}={text}"]):
        assert _parse([*TRAIN, *form])[0].adapter[name] == text


def test_layers_and_patterns():
    options = ["--adapter.layers_to_transform=0,2", "--adapter.rank_pattern", '{"ffn[.].*": 32}']
    options += ["--adapter.method_pattern={att.key: miss}", "--adapter.options.layout", "input"]
    found = _parse([*TRAIN, *options])[0].adapter
    assert found.layers_to_transform == [0, 2] and found.rank_pattern == {"ffn[.].*": 32}
    assert found.method_pattern == {"att.key": "miss"} and found.options == {"layout": "input"}


def test_lists():
    options, _ = _parse([*TRAIN, "--adapter.target_modules", "att.key,ffn.value", "--loggers=csv"])
    assert options.adapter.target_modules == ["att.key", "ffn.value"] and options.loggers == ["csv"]
    assert _parse([*TRAIN, "--adapter.target_modules=null"])[0].adapter.target_modules is None


@pytest.mark.parametrize("text", ["---", "###", "# part", "- ", "\n\n", "123", "true", "key: value", "[x]", "\n---\n"])
@pytest.mark.parametrize("form", [["--separator", "{}"], ["--separator={}"]])
def test_a_separator_is_what_was_typed(text, form):
    options, _ = _parse([*TRAIN, *(part.format(text) for part in form)])
    assert options.separator == text


def test_no_separator(tmp_path):
    """Neither in the arguments nor in the settings of an earlier run."""
    (tmp_path / "run.yaml").write_text("separator: null\n")
    assert _parse(TRAIN)[0].separator is None
    assert _parse([*TRAIN, f"--config={tmp_path / 'run.yaml'}"])[0].separator is None


@pytest.mark.parametrize("text", ["# Title", "- one", "---", "12", "null"])
def test_a_prompt_is_what_was_typed(text):
    options, _ = _parse(["generate", "--model=m.pth", "--tokenizer=bytes", "--prompt", text])
    assert options.prompt == text


def test_numbers_below_zero_are_values():
    assert _parse([*TRAIN, "--lr", "-1"])[0].lr == -1.0


def test_an_option_without_its_value(capsys):
    assert main([*TRAIN, "--separator", "--overwrite"]) == 2
    assert "expected one argument" in capsys.readouterr().err
