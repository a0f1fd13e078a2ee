from __future__ import annotations

import importlib.util
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from rwkv_miss.commands.cards import check_free, write_card
from rwkv_miss.commands.recorded import check_text, dropped, quantised_base, recorded_template

if TYPE_CHECKING:
    from rwkv_miss.data.templates import Template
    from rwkv_miss.export.target import Runtime, Text
    from rwkv_miss.merging.runtime import Ran

ExportDtype = Literal["f32", "f16", "bf16", "q8_0"]


def run(
    model: str,
    to: str,
    out: str,
    adapter: str | None = None,
    dtype: ExportDtype | None = None,
    tokenizer: str | None = None,
    template: str | None = None,
    overwrite: bool = False,
    card: bool = True,
) -> int:
    """Write a model, or an adapter alone, as a file for another runtime, and run it there if it is installed.

    Args:
        model: A checkpoint (.pth or .st). With an adapter, the base that it was trained on.
        to: The format. A whole model: gguf (llama.cpp, LM Studio, Ollama, KoboldCpp), st (web-rwkv, Ai00), hf (a folder
            of Hugging Face's for fla, rwkv7-hf and the ports to vLLM and SGLang), rwkv.cpp. An adapter alone: gguf-lora
            (for --lora of llama.cpp, on a base in any of its quantisations), st-lora (web-rwkv, Ai00), peft-lora (a
            folder of HF PEFT's for the model in an hf folder).
        out: The file or folder to write.
        adapter: The folder of an adapter, or of a run. A whole model is written with it merged in.
        dtype: Of the matrices; vectors and what is small stay in f32 where the format allows it. When not given, that
            of the checkpoint, or the first of the format's.
        tokenizer: world, bytes or another, for what is put into the file; when not given the one that the adapter was
            trained with, or world.
        template: world, g1, g1-think and others, or a file of yours, for the chat template in the file; when not given
            the one that the adapter was trained with, or world.
        overwrite: Replace the file if it is there, and its card.
        card: Write a model card too: README.md in a folder, beside a file one with its name and .md behind it.
    """
    from rwkv_miss.adapters.files import adapter_folder, read_facts
    from rwkv_miss.errors import UserError
    from rwkv_miss.export.table import ADAPTER_TARGETS, TARGETS
    from rwkv_miss.merging.alone import write_alone
    from rwkv_miss.merging.merge import merge
    from rwkv_miss.progress import show_progress

    models = {name: target for name, target in TARGETS.items() if target.dtypes}
    if to not in models and to not in ADAPTER_TARGETS:
        hint = "; rwkv-miss merge writes a .pth" if to in TARGETS else ""
        raise UserError(
            f"there is no format {to!r} to export to; there are {', '.join([*models, *ADAPTER_TARGETS])}{hint}"
        )
    needs = (models | ADAPTER_TARGETS)[to].needs
    if needs and importlib.util.find_spec(needs[0]) is None:
        raise UserError(
            f"{to} needs the package {needs[0]}, which is not installed: pip install 'rwkv-miss[{needs[1]}]'"
        )
    card_path = Path(f"{out}.md") if (models | ADAPTER_TARGETS)[to].suffix else Path(out) / "README.md"
    if card:
        check_free(card_path, overwrite)
    folder = adapter_folder(adapter) if adapter else None
    facts = [read_facts(folder)] if folder else []
    recorded = facts[0].get("tokenizer") if facts else None
    form = recorded_template(facts, template)
    tokens, what = check_text({tokenizer or recorded}, form)
    lines = []
    if to in ADAPTER_TARGETS:
        if folder is None:
            raise UserError(f"{to} is an adapter alone; give --adapter")
        if tokenizer is not None or template is not None:
            raise UserError(f"{to} has no place for a tokenizer or a template; leave --tokenizer and --template out")
        alone = write_alone(model, folder, out, ADAPTER_TARGETS[to], dtype, overwrite, tokens)
        lines.append(f"{out}: {alone.dtype}, {_size(out)}, beside {alone.linears} linears; read back as it was written")
        lines.append(_ran(alone.ran, ADAPTER_TARGETS[to].runtime))
    else:
        target = models[to]
        text = None
        if target.takes_text:
            text = _text(out, tokenizer or recorded or "world", form)
            if text.chat_template is None:
                lines.append(f"the template {form.name} has no form in Jinja: the file has no chat template")
        elif tokenizer is not None or template is not None:
            raise UserError(f"{to} has no place for a tokenizer or a template; leave --tokenizer and --template out")
        with show_progress("tensors written and read back") as on_tensor:
            folders = [] if folder is None else [folder]
            report = merge(
                model, folders, out, dtype, False, overwrite, on_tensor, tokens=tokens, target=target, text=text
            )
        effect = f"; the adapter changes them by {report.logits_effect:.1e}" if folder else ""
        lines.insert(0, f"{out}: {report.dtype}, {_size(out)}; read back as it was written")
        if report.logits_error is not None:
            lines.append(
                f"logits of what was read differ from {'base + adapter' if folder else 'the model'} by "
                f"{report.logits_error:.1e} of their size on {what}{effect}"
            )
        lines += [_ran(report.ran, target.runtime), *dropped(report, "--dtype f32"), *quantised_base(facts)]
    if card:
        given = {"adapter": adapter, "dtype": dtype, "tokenizer": tokenizer, "template": template}
        _write_card(card_path, model, to, out, given, facts, lines)
    console = Console(markup=False)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    return 0


def _text(out: str, name: str, form: Template) -> Text:
    from rwkv_miss.data.chat_template import as_jinja
    from rwkv_miss.data.tokenizers import load_tokenizer
    from rwkv_miss.errors import UserError
    from rwkv_miss.export.target import Text

    tokenizer = load_tokenizer(name)
    if tokenizer.pieces is None:
        raise UserError(f"tokenizer {name}: runtimes of this format know RWKV's own alone; give world or bytes")
    return Text(Path(out).stem, tokenizer.pieces(), as_jinja(form))


def _write_card(
    path: Path,
    model: str,
    to: str,
    out: str,
    options: Mapping[str, str | None],
    facts: Sequence[Mapping[str, Any]],
    lines: Sequence[str],
) -> None:
    """The card of an export; `lines` are what the command says."""
    from rwkv_miss.checkpoint import read_checkpoint
    from rwkv_miss.export.card import command
    from rwkv_miss.export.table import ADAPTER_TARGETS, TARGETS
    from rwkv_miss.model.recognise import infer_config

    version = infer_config(read_checkpoint(model), model).version
    given = {name: value for name, value in options.items() if value is not None}
    is_alone = to in ADAPTER_TARGETS
    quoted = {"sh": shlex.quote(out)}
    write_card(
        path,
        Path(out).name,
        f"{'An adapter for' if is_alone else 'An'} RWKV-{version}, written for another runtime.",
        version,
        [given["adapter"]] if facts else [],
        facts,
        ("Export", {"model": Path(model).name, "format": to, **given, "checked": "; ".join(lines)}),
        command("export", model=model, to=to, out=out, **given),
        {
            name: (language, code.replace("{out}", quoted.get(language, json.dumps(out))))
            for name, (language, code) in (ADAPTER_TARGETS[to] if is_alone else TARGETS[to]).uses.items()
        },
    )


def _size(out: str) -> str:
    files = [path for path in [Path(out), *Path(out).rglob("*")] if path.is_file()]
    return f"{sum(path.stat().st_size for path in files):,} bytes"


def _ran(ran: Ran | None, runtime: Runtime | None) -> str:
    if ran is not None:
        return (
            f"run in {ran.runtime}: log-probabilities differ by {ran.error:.1e} of the logits' size, and the likeliest "
            f"token is ours after {ran.agreeing} of {ran.prompts} texts"
        )
    if runtime is not None:
        return (
            f"no runtime was found, so that it was not run: pip install 'rwkv-miss[{runtime.extra}]' brings "
            f"{runtime.package}"
        )
    return "not run: no Python package runs this format on a CPU"
