"""The command line: `rwkv-miss COMMAND ...`. Each command is a function; its docstring and types are its help."""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jsonargparse
from rich.console import Console
from rich.table import Table

from rwkv_miss.config import AdapterConfig, DataOptions, TrainConfig
from rwkv_miss.errors import RunError, UserError

Dtype = Literal["bf16", "fp16", "fp32"]


def run_train(config: TrainConfig) -> int:
    from rwkv_miss.training.run import train
    from rwkv_miss.training.saving import Stopped

    console = Console()
    try:
        result = train(config, console)
    except Stopped as e:
        print(f"rwkv-miss train: stopped by {e} after saving a checkpoint; go on with --resume auto", file=sys.stderr)
        return 128 + e.signum
    best = ""
    if result.best_val_loss is not None:
        base = f"from {result.base_val_loss:.4f} " if result.base_val_loss is not None else ""
        best = f"; validation loss {base}to {result.best_val_loss:.4f} (best, step {result.best_step})"
    console.print(
        f"{result.steps} steps done{best}; adapter in {Path(config.out) / 'adapter'}", highlight=False, soft_wrap=True
    )
    return 0


def run_merge(base: str, adapter: str, out: str, dtype: Dtype | None = None, state_only: bool = False) -> int:
    """Write base + adapter as one .pth that any RWKV runtime reads, and check it.

    Args:
        base: The checkpoint that the adapter was trained on.
        adapter: The adapter's folder.
        out: The file to write, ending in .pth.
        dtype: Of every tensor written, but states (fp32); the base's own when not given.
        state_only: Write the learned state alone, as runtimes load it beside the base.
    """
    from rwkv_miss.merging import merge

    report = merge(base, adapter, out, dtype, state_only)
    table = Table("trained", "merged", "|dW| mean", "lost by the cast: mean", "most", title=f"{report.out}")
    kinds: dict[str, list[Any]] = {}
    for layer in report.layers:
        kinds.setdefault(re.sub(r"^blocks\.\d+\.", "", layer.name), []).append(layer)
    for kind, layers in kinds.items():
        losses = [layer.cast_loss for layer in layers]
        norm = sum(layer.delta_norm for layer in layers) / len(layers)
        table.add_row(kind, str(len(layers)), f"{norm:.4g}", f"{sum(losses) / len(losses):.2%}", f"{max(losses):.2%}")
    console = Console()
    console.print(table)
    console.print(
        f"{report.dtype}; logits of the written file differ from base + adapter by {report.logits_error:.1e} of their "
        f"size; the adapter changes the base's by {report.logits_effect:.1e}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def run_evaluate(
    model: str,
    data: str,
    tokenizer: str,
    adapter: str | None = None,
    exact_match: bool = False,
    text_field: str = "text",
    prompt_field: str | None = None,
    answer_field: str | None = None,
    limit: int | None = None,
    ctx_len: int = 512,
    batch_size: int = 32,
    max_tokens: int = 256,
    show: int = 3,
    dtype: Literal["bf16", "fp32"] | None = None,
    json: bool = False,
) -> int:
    """Loss and perplexity of a model on data, and how many of its answers are right.

    Args:
        model: A checkpoint (.pth or .st).
        data: .jsonl, .txt or a binidx, as for train.
        tokenizer: world, bytes, or the path of a Hugging Face tokenizer.json.
        adapter: The folder of an adapter to load onto the model.
        exact_match: Also let the model answer every question and count the answers equal to the data's.
        text_field: Field that holds plain text.
        prompt_field: Field that holds the prompt.
        answer_field: Field that holds the answer.
        limit: Use the first records (of a binidx: documents) only.
        ctx_len: Tokens in a row, for the loss; longer conversations lose their ends.
        batch_size: Rows or questions run together.
        max_tokens: Longest answer.
        show: Answers to print.
        dtype: The model runs in; the file's own when not given.
        json: Print one JSON object instead of text.
    """
    from itertools import islice

    from rwkv_miss.data.binidx import binidx_prefix
    from rwkv_miss.data.mapped import open_documents
    from rwkv_miss.data.readers.reader import read_records
    from rwkv_miss.data.tokenizers import load_tokenizer
    from rwkv_miss.evaluate import answers, documents_loss, mean_loss, perplexity

    for name, value in (("limit", limit), ("ctx_len", ctx_len), ("batch_size", batch_size), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    loaded = _load(model, adapter, dtype)
    tok = load_tokenizer(tokenizer)
    options = DataOptions(text_field=text_field, prompt_field=prompt_field, answer_field=answer_field)
    if prefix := binidx_prefix(data):
        if exact_match:
            raise UserError(f"{data}: a binidx has no questions and answers; leave out exact_match")
        records = open_documents(prefix, loaded.config.vocab_size, options)[:limit]
        loss, tokens = documents_loss(loaded, records, ctx_len, batch_size)
    else:
        records = list(islice(read_records(data, options), limit))
        loss, tokens = mean_loss(loaded, tok, records, options, ctx_len, batch_size)
    figures: dict[str, Any] = {"records": len(records), "tokens": tokens, "loss": loss, "perplexity": perplexity(loss)}
    shown = []
    if exact_match:
        given = answers(loaded, tok, records, options, max_tokens, batch_size)
        figures |= {"right": sum(a.is_right for a in given), "exact_match": sum(a.is_right for a in given) / len(given)}
        shown = given[:show]
    if json:
        print(_json_line(figures))
        return 0
    for a in shown:
        print(f"{a.prompt.strip()} {a.given}\n  [{'right' if a.is_right else 'wrong, expected: ' + a.expected}]\n")
    print(
        f"loss {loss:.4f} a token, perplexity {figures['perplexity']:.3f}, {tokens:,} tokens of {len(records)} records"
    )
    if exact_match:
        print(f"exact match: {figures['right']} of {len(records)} ({figures['exact_match']:.1%})")
    return 0


def run_generate(
    model: str,
    prompt: str,
    tokenizer: str,
    adapter: str | None = None,
    state: str | None = None,
    raw: bool = False,
    max_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 0.5,
    seed: int = 0,
    dtype: Literal["bf16", "fp32"] | None = None,
) -> int:
    """What a model answers to a question, or how it goes on with a text.

    Args:
        model: A checkpoint (.pth or .st).
        prompt: The question; it is put into the chat template unless raw is given.
        tokenizer: world, bytes, or the path of a Hugging Face tokenizer.json.
        adapter: The folder of an adapter to load onto the model.
        state: A .pth with a learned state (blocks.0.att.time_state, ...) to begin from.
        raw: Take the prompt as it is.
        max_tokens: Longest answer.
        temperature: 0 takes the likeliest token each time.
        top_p: Sample among the likeliest tokens whose probabilities sum to this.
        seed: Of the sampling.
        dtype: The model runs in; the file's own when not given.
    """
    from rwkv_miss.data.templates import chat_prompt
    from rwkv_miss.data.tokenizers import load_tokenizer
    from rwkv_miss.generate import generate
    from rwkv_miss.model.initial_state import load_initial_state

    loaded = _load(model, adapter, dtype)
    if state:
        load_initial_state(loaded, state)
    text = prompt if raw else chat_prompt(prompt)
    [answer] = generate(loaded, load_tokenizer(tokenizer), [text], max_tokens, temperature, top_p, seed)
    print(answer if raw else answer.strip())
    return 0


def run_info(file: str) -> int:
    """What is in a checkpoint, a state file or an adapter folder."""
    from rwkv_miss.adapters.files import read_adapter
    from rwkv_miss.checkpoint import fingerprint, infer_config, read_checkpoint
    from rwkv_miss.model.initial_state import is_state

    if Path(file).is_dir():
        adapter = read_adapter(file)
        rows = {
            "adapter": adapter.config.method,
            "parameters": f"{sum(t.numel() for t in (adapter.blocks | adapter.tensors).values()):,}",
            "base": (adapter.base_fingerprint or "not recorded")[:12],
        }
        if adapter.blocks:
            rows |= {
                "r": adapter.config.r,
                "linears": len(adapter.blocks),
                "targets": ", ".join(adapter.config.target_modules or []),
            }
        if adapter.tensors:
            kinds = {re.sub(r"^blocks\.\d+\.", "", name): None for name in adapter.tensors}
            rows["trained"] = ", ".join(kinds)
    elif (tensors := read_checkpoint(file)) and all(map(is_state, tensors)):
        shapes = {tuple(t.shape) for t in tensors.values()}
        rows = {"state": f"{len(tensors)} layers", "shape": ", ".join(map(str, shapes))}
    else:
        sizes = infer_config(tensors, file)
        rows = {
            "model": f"RWKV-{sizes.version}",
            "layers": sizes.n_layer,
            "n_embd": sizes.n_embd,
            "heads": f"{sizes.n_head} of {sizes.head_size}",
            "dim_ffn": sizes.dim_ffn,
            "vocabulary": f"{sizes.vocab_size:,}",
            "low rank": ", ".join(f"{k} {v}" for k, v in sizes.low_rank.items()),
            "parameters": f"{sum(t.numel() for t in tensors.values()):,}",
            "dtype": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})),
            "fingerprint": fingerprint(tensors)[:12],
        }
    for name, value in rows.items():
        print(f"{name:<12} {value}")
    return 0


def run_init(
    n_layer: int,
    n_embd: int,
    vocab_size: int,
    out: str,
    version: Literal[6, 7] = 7,
    head_size: int = 64,
    dim_ffn: int | None = None,
    low_rank: dict[str, int] | None = None,
    seed: int = 0,
    dtype: Dtype = "bf16",
) -> int:
    """Write a new model with BlinkDL's initial weights, to train from nothing.

    Args:
        n_layer: Layers.
        n_embd: Width, a multiple of head_size.
        vocab_size: Token ids: 65536 for the World tokenizer, 256 for bytes.
        out: The file to write, ending in .pth.
        version: Of RWKV.
        head_size: Channels in a head.
        dim_ffn: Width inside the channel mix; 4 n_embd (RWKV-7) or 3.5 n_embd rounded down to a multiple of
            32 (RWKV-6) when not given.
        low_rank: Widths of low-rank matrices to have instead of BlinkDL's, such as {w: 64}. RWKV-7 has w, a, v and g,
            RWKV-6 maa and decay.
        seed: Of the random matrices.
        dtype: Of every tensor written.
    """
    from rwkv_miss.model.init import new_config, write_initial

    if not 0 <= seed < 2**64:
        raise UserError(f"seed is {seed}; it must be at least 0 and below 2**64")
    config = new_config(version, n_layer, n_embd, vocab_size, head_size, dim_ffn, low_rank)
    parameters = write_initial(config, seed, out, dtype)
    print(f"{out}: RWKV-{version}, {n_layer} layers of {n_embd}, vocabulary {vocab_size:,}: {parameters:,} parameters")
    return 0


def run_binidx(
    data: str,
    tokenizer: str,
    out: str,
    text_field: str = "text",
    prompt_field: str | None = None,
    answer_field: str | None = None,
    separator: str | None = None,
) -> int:
    """Write data as a binidx, token ids that training maps into memory. Prompts in it are learned as answers are.

    Args:
        data: .jsonl or .txt, as for train.
        tokenizer: world, bytes, or the path of a Hugging Face tokenizer.json.
        out: PREFIX of the files to write, PREFIX.bin and PREFIX.idx.
        text_field: Field that holds plain text.
        prompt_field: Field that holds the prompt.
        answer_field: Field that holds the answer.
        separator: What parts the documents of a .txt file.
    """
    from rwkv_miss.data.corpus import records_to_binidx
    from rwkv_miss.data.tokenizers import load_tokenizer

    if out.endswith((".bin", ".idx")) or out.rpartition("/")[2] in ("", ".", ".."):
        raise UserError(f"out is {out!r}; give what comes before .bin and .idx in the names of the files to write")
    for path in (f"{out}.bin", f"{out}.idx"):
        if Path(path).exists():
            raise UserError(f"{path}: exists already; give another out, or remove it first")
    options = DataOptions(
        text_field=text_field, prompt_field=prompt_field, answer_field=answer_field, separator=separator
    )
    written = records_to_binidx(data, out, load_tokenizer(tokenizer), options)
    print(f"{out}.bin, {out}.idx: {written.documents:,} documents, {written.tokens:,} tokens")
    if written.with_prompts:
        print(
            f"documents with prompts: {written.with_prompts:,}; a binidx does not mark the answers, so training "
            f"on it learns the prompts too. Train on {data} itself to learn the answers alone"
        )
    return 0


def run_doctor(json: bool = False) -> int:
    """What this machine can run, and why not the rest; status 1 where the recurrence has no compiled kernel.

    Args:
        json: Print one JSON object instead of text.
    """
    from rwkv_miss.doctor import diagnose

    diagnosis = diagnose()
    if json:
        facts = {"chosen": diagnosis.chosen, "is_native": diagnosis.is_native, "found": dict(diagnosis.found)}
        print(_json_line(facts))
    else:
        for name, text in diagnosis.found:
            print(f"{name:<16} {text}")
        print(f"{'auto takes':<16} {diagnosis.chosen}")
    return 0 if diagnosis.is_native else 1


def run_bench(what: Literal["all", "wkv7", "tokenizer", "memory"] = "all", threads: int = 1) -> int:
    """Time our kernels and the tokenizer beside the programs they are measured against; measure a step's memory.

    Args:
        what: Which benchmark. memory: of a training step as its row grows, some minutes and not part of all.
        threads: CPU threads that every program gets.
    """
    from rwkv_miss import bench

    bench.run_bench(what, threads)
    return 0


# Their names are none of the package's: jsonargparse looks a function up there, which would import torch.
_COMMANDS = {
    "init": run_init,
    "data binidx": run_binidx,
    "merge": run_merge,
    "eval": run_evaluate,
    "generate": run_generate,
    "info": run_info,
    "doctor": run_doctor,
    "bench": run_bench,
}


_DATA_HELP = "Prepare training data."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. 0: done; 1: the run failed; 2: the input is wrong; 128 + n: stopped by signal n."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("rwkv_miss").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 calls what torch 2.13 deprecates
    command = ""
    try:
        args = _parse(argv)
        command, options = args.subcommand, args[args.subcommand]
        while "subcommand" in options:
            command, options = f"{command} {options.subcommand}", options[options.subcommand]
        options = options.as_dict()
        if command == "train":
            options.pop("config")
            return run_train(TrainConfig(**options | {"adapter": AdapterConfig(**options["adapter"])}))
        return _COMMANDS[command](**options)
    except (UserError, jsonargparse.ArgumentError) as e:
        print(f"rwkv-miss {command}".rstrip() + f": {_one_line(e)}", file=sys.stderr)
        return 2
    except RunError as e:
        print(f"rwkv-miss {command}: {e}", file=sys.stderr)
        return 1


def _parse(argv: Sequence[str] | None) -> jsonargparse.Namespace:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="rwkv-miss", description="Fine-tune RWKV-6 and RWKV-7 with MiSS.", exit_on_error=False, version=_version()
    )
    commands = parser.add_subcommands()
    data = jsonargparse.ArgumentParser(description=_DATA_HELP, exit_on_error=False)
    commands.add_subcommand("data", data, help=_DATA_HELP)
    groups = {"": commands, "data": data.add_subcommands()}
    for name, function in _COMMANDS.items():
        sub = jsonargparse.ArgumentParser(description=function.__doc__.splitlines()[0], exit_on_error=False)
        if function is run_info:  # the one command with a positional argument
            sub.add_argument("file", help="A .pth or .st file of a model or a state, or the folder of an adapter.")
        else:
            sub.add_function_arguments(function, as_group=False)
        group, _, last = name.rpartition(" ")
        groups[group].add_subcommand(last, sub, help=function.__doc__.splitlines()[0])
    sub = jsonargparse.ArgumentParser(description=TrainConfig.__doc__, exit_on_error=False)
    sub.add_argument("--config", action="config", help="YAML file with any of these options.")
    sub.add_class_arguments(TrainConfig, as_group=False)
    commands.add_subcommand("train", sub, help=TrainConfig.__doc__)
    for command in commands.choices.values():
        for action in command._actions:
            if getattr(action, "_typehint", None) is bool:
                action.nargs, action.const = "?", True  # --json alone means --json true
    return parser.parse_args(argv)


def _version() -> str:
    from rwkv_miss import __version__

    return __version__


def _load(path: str, adapter: str | None, dtype: str | None):
    import torch

    from rwkv_miss.adapters.files import load_adapter
    from rwkv_miss.model import load_model

    model = load_model(path, dtype, "cuda" if torch.cuda.is_available() else "cpu").eval()
    return load_adapter(model, adapter) if adapter else model


def _json_line(figures: dict[str, Any]) -> str:
    return json.dumps(figures)


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())
