"""The command line: `rwkv-miss COMMAND ...`. The commands are in `rwkv_miss.commands`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
import os
import re
import signal
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import jsonargparse

from rwkv_miss import __version__
from rwkv_miss.commands import COMMANDS, GROUPS
from rwkv_miss.config import ALL_LINEAR
from rwkv_miss.errors import RunError, Stopped, UserError
from rwkv_miss.files import read_yaml

# What other trainers call some of our options: RWKV-PEFT, RWKV-LM, Hugging Face's Trainer and PEFT.
_ELSEWHERE = {
    "learning_rate": "lr",
    "lr_init": "lr",
    "lr_final": "lr_min",
    "load_model": "base",
    "model_name_or_path": "base",
    "data_file": "data",
    "dataset": "data",
    "proj_dir": "out",
    "output_dir": "out",
    "micro_bsz": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate",
    "accumulate_grad_batches": "accumulate",
    "num_train_epochs": "epochs",
    "epoch_count": "epochs",
    "grad_cp": "gradient_checkpointing",
    "max_length": "ctx_len",
    "max_seq_length": "ctx_len",
    "warmup": "warmup_steps",
    "r": "adapter.r",
    "rank": "adapter.r",
    "lora_r": "adapter.r",
    "dropout": "adapter.dropout",
    "peft": "adapter.method",
    "method": "adapter.method",
    "target_modules": "adapter.target_modules",
    "n_gpu": "devices",
    "max_new_tokens": "max_tokens",
}


# The most characters of a message.
_LONGEST = 1500
# What Lightning 2.6 and DeepSpeed 0.19 call that torch 2.13 deprecates, and that a checkpoint of ZeRO-3 is a folder.
_NOT_THE_USERS = r".*(LeafSpec|torch\.distributed\.\w+).*is deprecated|When saving the DeepSpeed Stage 3 checkpoint"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. 0: done; 1: the run failed; 2: the input is wrong; 128 + n: stopped by signal n."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("rwkv_miss").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", message=_NOT_THE_USERS)
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = ""
    try:
        parsed, command = _parse(arguments)
        return COMMANDS[command](**_arguments(COMMANDS[command], parsed))
    except (UserError, jsonargparse.ArgumentError) as e:
        message = _one_line(str(e)) if isinstance(e, UserError) else _explain(_one_line(str(e)), arguments)
        _say(f"rwkv-miss {command}".rstrip() + f": {message}")
        return 2
    except RunError as e:
        _say(f"rwkv-miss {command}: {e}")
        return 1
    except MemoryError as e:
        _say(f"rwkv-miss {command}: there is not enough memory ({_one_line(str(e))})")
        return 1
    except Stopped as e:
        _say(f"rwkv-miss {command}: stopped by {e} after saving a checkpoint; go on with --resume auto")
        return 128 + e.signum
    except KeyboardInterrupt:
        _say(f"rwkv-miss {command}".rstrip() + ": interrupted")
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whatever reads the output, such as `head`, has gone
        _let_go_of(sys.stdout)
        return 128 + signal.SIGPIPE


def _say(message: str) -> None:
    """Prints a line on stderr, if that is still there: a terminal may have been closed."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:
        _let_go_of(sys.stderr)
        _let_go_of(sys.stdout)


def _let_go_of(stream: TextIO) -> None:
    """Nothing that is written to the stream from now on fails, the last flush at Python's end included."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parse(arguments: list[str]) -> tuple[jsonargparse.Namespace, str]:
    """The options of the command that was given, and its name."""
    for path in _configs(arguments):
        read_yaml(Path(path))  # the parser reads it again, as it is
    try:
        found = _parser(_command(arguments)).parse_args(_as_meant(arguments))
    except (ValueError, OverflowError, RecursionError) as e:  # of a value that has the right type and cannot be taken
        raise UserError(f"an option cannot be read ({e}); give a plain value") from None
    command, options = found.subcommand, found[found.subcommand]
    while "subcommand" in options:
        command, options = f"{command} {options.subcommand}", options[options.subcommand]
    return options, command


def _configs(arguments: list[str]) -> list[str]:
    """The files that --config names."""
    return [
        *(value for name, value in pairwise(arguments) if name == "--config"),
        *(argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")),
    ]


def _command(arguments: list[str]) -> str:
    """The name of the command that the arguments begin with, if there is one of that name."""
    return " ".join(arguments[: 2 if arguments[:1] and arguments[0] in GROUPS else 1])


def _parser(wanted: str) -> jsonargparse.ArgumentParser:
    """The parser, with the options of one command: those of all take a quarter of a second to make."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    settings: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}
    description = "Fine-tune RWKV-6 and RWKV-7 with MiSS."
    parser = jsonargparse.ArgumentParser(prog="rwkv-miss", description=description, version=__version__, **settings)
    places = {"": parser.add_subcommands()}
    for name, help_text in GROUPS.items():
        group = jsonargparse.ArgumentParser(description=help_text, **settings)
        places[""].add_subcommand(name, group, help=help_text)
        places[name] = group.add_subcommands()
    for name, function in COMMANDS.items():
        help_text = (function.__doc__ or "").splitlines()[0]
        sub = jsonargparse.ArgumentParser(description=help_text, **settings)
        if name == wanted:
            _add_options(sub, function)
        group_name, _, last = name.rpartition(" ")
        places[group_name].add_subcommand(last, sub, help=help_text)
    return parser


def _add_options(parser: jsonargparse.ArgumentParser, function: Callable[..., int]) -> None:
    """The function's arguments as options; the fields of an argument that is a dataclass are options themselves, and a
    YAML file may hold them. A command's only argument without a default, if it is called `file`, has no name."""
    flat = _dataclass_arguments(function)
    if flat:
        parser.add_argument("--config", action="config", help="YAML file with any of these options.")
    rest = [name for name in inspect.signature(function).parameters if name not in flat]
    if rest == ["file"]:
        parser.add_argument("file", help=_help_of(function, "file"))
    elif rest:
        parser.add_function_arguments(function, as_group=False, skip=set(flat))
    for cls in flat.values():
        parser.add_class_arguments(cls, as_group=False)
    for action in parser._actions:
        kind = getattr(action, "_typehint", None)
        if kind is bool:
            action.nargs, action.const = "?", True  # --json alone means --json true
        elif kind == str | None:  # text as it stands, although some is YAML for nothing, such as --- and ###
            action._typehint = str  # type: ignore[attr-defined]


def _arguments(function: Callable[..., int], options: jsonargparse.Namespace) -> dict[str, Any]:
    """The parsed options as the function's arguments."""
    flat = _dataclass_arguments(function)
    values = options.as_dict()
    values.pop("config", None)
    for argument, cls in flat.items():
        own = {field.name: values.pop(field.name) for field in dataclasses.fields(cls)}
        for field_name, kind in typing.get_type_hints(cls).items():
            if dataclasses.is_dataclass(kind):
                if not isinstance(own[field_name], dict):
                    raise UserError(f"{field_name} is {own[field_name]!r}; give its settings by their names")
                own[field_name] = kind(**own[field_name])  # type: ignore[operator]
        values[argument] = cls(**own)
    return values


def _dataclass_arguments(function: Callable[..., int]) -> dict[str, type]:
    hints = typing.get_type_hints(function)
    return {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind) and isinstance(kind, type)}


def _help_of(function: Callable[..., int], argument: str) -> str:
    """An argument's description in the function's docstring."""
    found = re.search(rf"^\s*{argument}: (.*)$", function.__doc__ or "", re.MULTILINE)
    return found[1] if found else ""


def _as_meant(arguments: list[str]) -> list[str]:
    """The arguments in a form in which the parser does not misunderstand a value: text is not taken for an option
    because of dashes at its beginning (`--separator ---`), and one name where a list is expected is a list of it
    (`--adapter.target_modules att.key`)."""
    found: list[str] = []
    for argument in arguments:
        before = found[-1] if found else ""
        if re.match(r"-(?!-?[A-Za-z])", argument) and before.startswith("--") and "=" not in before:
            found[-1] = f"{before}={argument}"
        else:
            found.append(argument)
    return _as_lists(found)


def _as_lists(arguments: list[str]) -> list[str]:
    """One name where a list is expected as a list of it; several may be parted by commas. Where text may stand too, it
    is a regular expression: a plain name would mean the same as one."""
    lists = {f"--adapter.{f.name}" for f in _fields("AdapterConfig") if "list[" in str(f.type)}
    for name in ("TrainConfig", "EvalConfig"):
        lists |= {f"--{f.name}" for f in _fields(name) if re.match(r"list\[(str|int)\]", str(f.type))}
    found = list(arguments)
    for i, argument in enumerate(found):
        name, equals, value = argument.partition("=")
        if name not in lists:
            continue
        if equals:
            found[i] = f"{name}={_as_list(value)}"
        elif i + 1 < len(found):
            found[i + 1] = _as_list(found[i + 1])
    return found


def _fields(name: str) -> tuple[dataclasses.Field, ...]:
    from rwkv_miss import config

    return dataclasses.fields(getattr(config, name))


def _as_list(value: str) -> str:
    is_plain = re.fullmatch(r"[\w./][\w./, -]*", value) and value not in ("null", "None", ALL_LINEAR)
    return f"[{value}]" if is_plain else value


def _explain(message: str, arguments: list[str]) -> str:
    """The parser's message in the user's words: the option that was meant where there is none of that name."""
    if wrong := re.search(r"subcommand: invalid choice: '(.*?)'", message):
        near = difflib.get_close_matches(wrong[1], [name.split()[0] for name in COMMANDS], n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        return f"there is no command {wrong[1]!r}; {hint}"
    unknown = re.search(r"[Uu]nrecognized arguments: (.*)", message)
    if not unknown:
        return re.sub(r"\binfo\.file\b", "FILE", message)
    option = unknown[1].split()[0].split("=")[0]
    there = _option_names(arguments)
    meant = option.lstrip("-").replace("-", "_")
    near = [name for name in (_ELSEWHERE.get(meant, meant),) if name in there]
    near = near or difflib.get_close_matches(meant, there, n=2)
    hint = f"did you mean {' or '.join(f'--{name}' for name in near)}?" if near else "--help lists the options"
    return f"there is no option {option}; {hint}"


def _option_names(arguments: list[str]) -> list[str]:
    """The names of the options of the command that the arguments begin with."""
    parser = _parser(_command(arguments))
    for argument in arguments:
        commands = next((a.choices for a in parser._actions if isinstance(a.choices, dict)), None)
        if not commands or argument not in commands:
            break
        parser = commands[argument]
    return [name.removeprefix("--") for action in parser._actions for name in action.option_strings]


def _one_line(text: str) -> str:
    """A message as one line that a terminal shows as it is and that can be read: what it quotes may be anything."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} [...] {line[-_LONGEST // 2 :]}"
