"""The checks of a run that can be made before torch is imported and a model is loaded, which take seconds."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import tempfile
import zipfile
from dataclasses import asdict, dataclass, fields
from inspect import signature
from pathlib import Path
from typing import Any

from rwkv_miss.adapters import method
from rwkv_miss.config import AdapterConfig, TrainConfig, value_problems
from rwkv_miss.data.sources import Source, check_sources, parse_sources
from rwkv_miss.data.templates import find_template
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.errors import UserError
from rwkv_miss.files import check_is_file, check_name, read_yaml
from rwkv_miss.training import loggers
from rwkv_miss.training.deepspeed_json import read_deepspeed_json
from rwkv_miss.training.figures import read_figures, read_samples
from rwkv_miss.training.objective import OBJECTIVES

OURS = (
    *("adapter", "adapter_last", "checkpoints", "tensorboard", "wandb"),
    *("metrics.csv", "samples.jsonl", "report.html", "run.json", "config.yaml"),
)
"""What a run leaves in its folder."""
# The paths there of the files and folders that runs write themselves.
_WRITTEN = re.compile(
    r"config\.yaml|metrics\.csv|samples\.jsonl|report\.html|run\.json"
    r"|adapter(_last)?/(adapter_config\.json|adapter_model\.safetensors|rwkv_miss\.json|README\.md)"
    r"|checkpoints/(step-\d+|\.step-\d+\.part)|tensorboard/events\.out\.tfevents\..*"
    r"|(adapter(_last)?/)?\.[\w.]+\.\d+\.part"
    r"|wandb/((offline-)?run-\d+_\d+-\w+|latest-run|debug(-internal)?\.log)"
)
# What a resumed run must have in common with the run that it goes on with. AdamW's settings come from the checkpoint,
# whatever is given; the base and the data are identified by their fingerprints, since their files may have moved.
_SAME = (
    *("tokenizer", "text_field", "prompt_field", "answer_field", "separator", "answer_lines", "answer_end"),
    *("template", "learn", "learn_thoughts"),
    "val_split",
    *("ctx_len", "long_documents", "chunk_len", "bptt_chunks", "packing", "seed"),
    *("adapter", "adapter_from", "objective", "quant", "quant_skip", "precision"),
    *("lr", "lr_state", "weight_decay", "betas"),
    *("schedule", "warmup_steps", "lr_min", "grad_clip"),
)
# How the rows of an optimizer step are shared out. With others, a run goes on if a step has as many rows as before.
_ROWS = ("batch_size", "accumulate", "devices", "num_nodes")
_SHARING = (*_ROWS, "strategy", "offload")
# What starts all processes of a run itself: a variable by which it is recognised, one with their number, and its name.
_LAUNCHERS = {
    "TORCHELASTIC_RUN_ID": ("WORLD_SIZE", "torchrun"),
    "CROSS_RANK": ("WORLD_SIZE", "deepspeed"),
    "SLURM_NTASKS": ("SLURM_NTASKS", "SLURM"),
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "MPI"),
}
# What runs did before a setting existed, if that differs from its default now.
_BEFORE = {"answer_lines": "join", "answer_end": "blank_line"}


def is_first_process() -> bool:
    """Whether this process is the first of its run. Lightning starts the others by running the command again, or
    torchrun or SLURM have started them; only the first checks the run's folder and prints."""
    return all(int(os.environ.get(name, 0)) == 0 for name in ("LOCAL_RANK", "NODE_RANK", "RANK", "SLURM_PROCID"))


@dataclass(frozen=True)
class Resume:
    """Where a run goes on: its checkpoint and that one's optimizer step. changed: in which way the work was shared then
    and is shared now, as text for a message; empty if it is the same."""

    path: Path
    step: int
    changed: str = ""


def setting_problems(config: TrainConfig) -> list[str]:
    """Every mistake in the settings and in the method's, told without opening a file. Raises UserError for values that
    are missing or beyond all bounds: what is looked at besides needs values."""
    if found := value_problems(config) + value_problems(config.adapter, "adapter."):
        raise UserError("; ".join(found))
    found = config.problems() + config.adapter.problems()
    return found + method.problems(config.adapter, None if config.adapter_from else config)


def check_run(config: TrainConfig) -> Resume | None:
    """Checks a run's settings, its files' names and its folder.

    Returns:
        Where to go on; None for a new run.

    Raises:
        UserError: all mistakes in the settings in one message, or the first thing that is wrong with a file or the
            folder.
    """
    found = setting_problems(config)
    found += loggers.problems(config.loggers)
    if config.quant != "none" and importlib.util.find_spec("bitsandbytes") is None:
        found.append(f"quant is {config.quant}, but bitsandbytes is not installed: pip install 'rwkv-miss[quant]'")
    if config.objective not in OBJECTIVES:
        found.append(f"objective is {config.objective!r}; there are {', '.join(OBJECTIVES)}")
    if found:
        raise UserError("; ".join(found))
    _check_launcher(config)
    read_deepspeed_json(config)
    check_is_file(Path(config.base), "checkpoint")
    load_tokenizer(config.tokenizer)
    find_template(config.template)
    check_sources(_sources(config), config)
    if is_first_process():
        _check_out(Path(config.out), config)
    return _find_resume(Path(config.out), config) if config.resume == "auto" else None


def last_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest whole checkpoint of a run and its optimizer step; None where there is none."""
    found = [(int(m.group(1)), p) for p in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name))]
    return (max(found)[1], max(found)[0]) if found else None


def written_by_runs(out: Path) -> list[Path]:
    """The files and folders in a run's folder that runs write themselves, and no others: what a new run replaces."""
    found = [path for name in OURS for path in (out / name, *(out / name).glob("*"))] + [*out.glob(".*.part")]
    return [path for path in found if _WRITTEN.fullmatch(path.relative_to(out).as_posix()) and path.exists()]


def as_yaml(config: TrainConfig) -> dict[str, Any]:
    """The settings as config.yaml has them, in the order of `TrainConfig`'s arguments."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
    return {name: values[name] for name in signature(TrainConfig).parameters}


def _check_launcher(config: TrainConfig) -> None:
    """UserError if a launcher has started another number of processes than the settings say, or if a run on several
    machines was not told where its processes meet: it would wait for ever."""
    found = [name for name in _LAUNCHERS if name in os.environ]
    if os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):  # a shell, in which SLURM starts nothing
        found = [name for name in found if name != "SLURM_NTASKS"]
    if found:
        variable, name = _LAUNCHERS[found[0]]
        if (wanted := config.devices * config.num_nodes) != (started := int(os.environ[variable])):
            raise UserError(
                f"{name} has started {started} processes ({variable}), but devices {config.devices} x num_nodes "
                f"{config.num_nodes} is {wanted}; make them equal"
            )
        return
    if config.num_nodes == 1:
        return
    needed = {
        "MASTER_ADDR": "the first machine's address",
        "MASTER_PORT": "a free port on it",
        "NODE_RANK": f"0 on the first machine, 1 on the second, ... up to {config.num_nodes - 1}",
    }
    if missing := [f"{name} ({meaning})" for name, meaning in needed.items() if name not in os.environ]:
        raise UserError(
            f"num_nodes is {config.num_nodes}, but the environment lacks {', '.join(missing)}; set MASTER_ADDR, "
            "MASTER_PORT and NODE_RANK on every machine and start this same command on each, such as "
            "MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 NODE_RANK=1 rwkv-miss train ... on the second; or start it by "
            f"one of {', '.join(name for _, name in _LAUNCHERS.values())}"
        )


def _check_out(out: Path, config: TrainConfig) -> None:
    """UserError where the folder may not be used."""
    check_name(out, "a folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; out must be a folder")
    _check_writable(out)
    ours = [out, *(out / name for name in OURS)]
    if dead := [path for path in ours if path.is_symlink() and not path.exists()]:
        raise UserError(f"{dead[0]}: links to {os.readlink(dead[0])}, which is not there; make it, or remove the link")
    if config.overwrite:
        _check_inputs_stay(out, config)
    found = [name for name in OURS if (out / name).exists()]
    if found and not config.overwrite and config.resume != "auto":
        raise UserError(
            f"{out}: holds another run ({', '.join(found)}); give another out, --resume auto to go on with it, or "
            "--overwrite true to replace it"
        )


def _find_resume(out: Path, config: TrainConfig) -> Resume | None:
    """Where to go on; UserError if that cannot be with these settings."""
    changed = ""
    if (out / "config.yaml").is_file():
        before, now = read_settings(out / "config.yaml"), as_yaml(config)
        if other := [f"{k} was {before[k]}, is {now[k]}" for k in _SAME if before[k] != now[k]]:
            raise UserError(f"{out}: cannot resume with other settings: {'; '.join(other)}")
        changed = ", ".join(f"{k} {now[k]} (it was {before[k]})" for k in _SHARING if before[k] != now[k])
        rows = [math.prod(settings[k] for k in _ROWS) for settings in (before, now)]
        if rows[0] != rows[1]:
            raise UserError(
                f"{out}: cannot resume with {changed}: an optimizer step had {rows[0]} rows ({' x '.join(_ROWS)}) and "
                f"would have {rows[1]}; change accumulate or batch_size so that it has {rows[0]}"
            )
    read_figures(out / "metrics.csv")
    read_samples(out / "samples.jsonl")
    if not (found := last_checkpoint(out / "checkpoints")):
        # A run makes the folder of its checkpoints before it saves anything.
        adapters = [name for name in ("adapter", "adapter_last") if (out / name).exists()]
        if adapters and not (out / "checkpoints").exists():
            raise UserError(
                f"{out}: holds {adapters[0]}/ but no checkpoints/ to go on from, and a new run would replace it; give "
                "another out, or --overwrite true"
            )
        return None
    path, step = found
    if not path.is_dir() and not (path.is_file() and zipfile.is_zipfile(path)):
        raise UserError(f"{path}: not a whole checkpoint (truncated?); start anew with --overwrite true")
    return Resume(path, step, changed)


def _check_inputs_stay(out: Path, config: TrainConfig) -> None:
    """UserError if a file that the run reads is among what it would replace."""
    files = [file for source in _sources(config) for file in source.files]
    for name in (Path(config.base), Path(config.tokenizer), *files):
        source = name.resolve()
        for path in written_by_runs(out):
            if path.resolve() in (source, *source.parents):
                raise UserError(f"{name}: --overwrite true would remove it with {path}; move it, or give another out")


def _sources(config: TrainConfig) -> list[Source]:
    """What is trained on and what is validated on. Raises UserError as `parse_sources`."""
    sources = parse_sources(config.data, config)
    return sources + (parse_sources(config.val_data, config, weights=False) if config.val_data else [])


def _check_writable(out: Path) -> None:
    """UserError unless files can be written to the folder, or to the nearest one above that is there."""
    folder = out
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        where = f" in {folder}" if folder != out else ""
        raise UserError(f"{out}: cannot be written{where}: {e.strerror}; give another out") from None


def read_settings(path: Path) -> dict[str, Any]:
    """A run's settings, from its config.yaml. Those that did not exist yet when it ran have their defaults, or what
    `_BEFORE` says."""
    found = read_yaml(path)
    is_settings = isinstance(found, dict) and isinstance(found.get("adapter"), dict)
    if not is_settings or any(type(found.get(name, 1)) is not int for name in _ROWS):
        raise UserError(f"{path}: not the settings of a run; remove the file, or start anew with --overwrite true")
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    return defaults | _BEFORE | found | {"adapter": asdict(AdapterConfig()) | found["adapter"]}
