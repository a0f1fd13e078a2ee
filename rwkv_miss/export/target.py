"""What is exported (`Weights` of a model, or an `Adapter` alone), and the formats that it can be written to (`Target`,
`AdapterTarget`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.adapters.files import AdapterFile
from rwkv_miss.adapters.method import Factors
from rwkv_miss.adapters.plan import Plan
from rwkv_miss.checkpoint import DTYPES, TensorSpec
from rwkv_miss.config import ModelConfig
from rwkv_miss.errors import UserError
from rwkv_miss.model.initial_state import is_state


@dataclass(frozen=True)
class Text:
    """What a file says of text, in a format that has a place for it.

    name: what the model is called.
    tokens: the bytes of each id of the tokenizer, from 0 on, which ends a document.
    chat_template: in Jinja; None where there is none.
    """

    name: str
    tokens: Sequence[bytes]
    chat_template: str | None


@dataclass(frozen=True)
class Weights:
    """A model's tensors, each made when it is asked for, so that they are never all in memory.

    sizes: the model's sizes.
    specs: every tensor's shape and dtype by its key in BlinkDL's layout, in the order of the file to write.
    pieces: key -> some rows after the other of the tensor that its spec describes, contiguous. It is called once for
        each key, in that order, and what it gave before may be overwritten when the next is asked for. A format that
        rounds further than the spec's dtype puts what it holds into the piece.
    dtype: which of `Target.dtypes` is written; the specs' dtypes follow from it.
    text: None in formats that have no place for it, and where it is not known.
    """

    sizes: ModelConfig
    specs: Mapping[str, TensorSpec]
    pieces: Callable[[str], Iterable[Tensor]]
    dtype: str = ""
    text: Text | None = None

    def compute(self, key: str) -> Tensor:
        """The whole tensor, for formats that are written so; called in place of `pieces`."""
        spec = self.specs[key]
        out, at = torch.empty(spec.shape.numel(), dtype=spec.dtype), 0
        for piece in self.pieces(key):
            out[at : at + piece.numel()] = piece.flatten()
            at += piece.numel()
        return out.view(spec.shape)


@dataclass(frozen=True)
class Adapter:
    """An adapter that is exported without its base.

    folder: where it was read, for messages.
    sizes, shapes: those of the base, and of its tensors by their keys.
    file, plan: what was read, and what it trained of the base.
    dtype: which of `AdapterTarget.dtypes` is written. holds: as in `AdapterTarget`.
    """

    folder: Path
    sizes: ModelConfig
    shapes: Mapping[str, torch.Size]
    file: AdapterFile
    plan: Plan
    dtype: str
    holds: Callable[[str, torch.Size], bool]

    def factors(self) -> Iterator[tuple[str, Factors]]:
        """(the path of a linear, its dW = B A), one linear after the other; the scale is in B.

        Raises:
            UserError: what was trained is no product of two thin matrices beside each linear, nor held otherwise.
        """
        instead = "export the merged model instead: --model BASE --adapter DIR with a --to that writes a whole model"
        if key := next((key for key, (tensor,) in self.whole() if not self.holds(key, tensor.shape)), None):
            what = "a learned state" if is_state(key) else "a part of the base"
            raise UserError(f"{self.folder}: it trained {key}, {what}, which is not beside a linear; {instead}")
        linears = self.file.linears
        for path, (method, own) in self.plan.linears.items():
            product = method.factors(linears[path], self.shapes[f"{path}.weight"], own, exact=False)
            if product is None:
                raise UserError(f"{self.folder}: {path}: what {own.method} adds is no product B A; {instead}")
            yield path, product

    def whole(self) -> Iterator[tuple[str, tuple[Tensor]]]:
        """The key of each tensor of the base that was trained directly, and its values."""
        return ((key, (self.file.tensors[key],)) for key in self.plan.whole)


@dataclass(frozen=True)
class Runtime:
    """A program that runs what was exported, by its Python package.

    package: the distribution's name; module: what is imported of it; extra: that of rwkv-miss which brings it.
    log_probs: (model file, adapter file or None, prompts as ids, none empty) -> for each prompt the natural logarithms
        of the probabilities of the token that follows it, by id: of all tokens, or of the likeliest, that first.
    needs: what else is imported.
    """

    package: str
    module: str
    extra: str
    log_probs: Callable[[Path, Path | None, Sequence[Sequence[int]]], Sequence[Mapping[int, float]]]
    needs: Sequence[str] = ()

    @property
    def is_installed(self) -> bool:
        return all(importlib.util.find_spec(module) for module in (self.module, *self.needs))


def named_dtype(name: str) -> torch.dtype:
    """The dtype that a `--dtype` of exports names."""
    return DTYPES[{"f16": "fp16", "f32": "fp32"}.get(name, name)]


def _as_named(key: str, shape: torch.Size, dtype: str) -> torch.dtype:
    return named_dtype(dtype)


@dataclass(frozen=True)
class Target:
    """A format that a model can be written to.

    suffix: what the names of such files end in; empty for a folder.
    write: (path, weights): writes the file, one tensor at a time. Raises OSError if it cannot be written, UserError if
        the format cannot hold the model.
    read: path -> the tensors of such a file by their keys in BlinkDL's layout, equal to those of `Weights`: a file is
        verified by reading it back.
    dtypes: the names of `--dtype` of which the format holds one, in a file for a runtime (`rwkv-miss export`). Without
        them a file has any dtypes, those of the base or one for all, as `rwkv-miss merge` writes it.
    stored: (key, shape, one of `dtypes`) -> the dtype of that tensor in `Weights.specs`.
    tolerance: how far the rounding of one of `dtypes` that torch does not have may move the logits: the root mean
        square of the difference, relative to that of the logits. `read` then makes each tensor when it is asked for,
        and the model is not computed here, for which all would be in memory.
    takes_text: whether `Weights.text` is asked for.
    check_sizes: raises UserError for a model that the format or its runtimes cannot hold, before anything is computed.
    needs: (the package that writes the format, rwkv-miss's extra which brings it), if it is none of the dependencies.
    runtime: what a written file is run with, if it is installed.
    uses: how users run it: name -> (language, code), in which `{out}` stands for the path.
    """

    suffix: str
    write: Callable[[Path, Weights], None]
    read: Callable[[Path], Mapping[str, Tensor]]
    dtypes: Sequence[str] = ()
    stored: Callable[[str, torch.Size, str], torch.dtype] = _as_named
    tolerance: Mapping[str, float] = field(default_factory=dict)
    takes_text: bool = False
    check_sizes: Callable[[ModelConfig], None] = lambda sizes: None
    needs: tuple[str, str] | None = None
    runtime: Runtime | None = None
    uses: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterTarget:
    """A format that an adapter can be written to without its base.

    suffix, dtypes, needs, check_sizes, uses: as in `Target`; the first dtype is written where none is given.
    write: (path, adapter): writes the file. Raises OSError if it cannot be written, UserError if the format cannot hold
        the adapter.
    read: path -> the product beside each linear, by the linear's path, and what was trained directly, by its key, equal
        to `Adapter.factors` and `Adapter.whole` but for the rounding to the dtype.
    runtime, base: what a written file is run with, on a base written as this target of `TARGETS`.
    holds: (key, shape) -> whether the format can hold such a tensor of the base, if it was trained directly.
    """

    suffix: str
    write: Callable[[Path, Adapter], None]
    read: Callable[[Path], Mapping[str, tuple[Tensor, ...]]]
    dtypes: Sequence[str]
    needs: tuple[str, str] | None = None
    runtime: Runtime | None = None
    base: str = ""
    check_sizes: Callable[[ModelConfig], None] = lambda sizes: None
    holds: Callable[[str, torch.Size], bool] = lambda key, shape: False
    uses: Mapping[str, tuple[str, str]] = field(default_factory=dict)
