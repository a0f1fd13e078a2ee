"""What a training method is, and the table of the methods. Importing this imports no torch: the settings of a run are
checked against the table before anything heavy is loaded."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from rwkv_miss.config import AdapterConfig, ModelConfig, TrainConfig
from rwkv_miss.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from rwkv_miss.model.base import RWKV
    from rwkv_miss.model.linear import FrozenLinear


class Group(NamedTuple):
    """How the optimizer treats a parameter. Parameters of equal groups share one.

    name: the name of its learning rate, "" for the run's own; metrics.csv has a column for each, `lr` or `lr_{name}`.
    """

    name: str
    lr: float
    weight_decay: float


class Factors(NamedTuple):
    """dW = B A, with A fp32 (r, in) and B fp32 (out, r)."""

    A: Tensor
    B: Tensor


class Method:
    """A way of training: which of the base's own parameters and learned states it trains, if any. A `LinearMethod` also
    puts tensors of its own beside linears."""

    def keys(self, sizes: ModelConfig, base: Collection[str]) -> list[str]:
        """The checkpoint keys of what the method trains directly: any of `base`, the keys of the base's parameters,
        or those of the states of `rwkv_miss.model.initial_state`."""
        return []

    def group(self, key: str, parameter: nn.Parameter, kind: type[RWKV], config: TrainConfig) -> Group:
        """The optimizer's group of a trained parameter.

        Args:
            key: its checkpoint key, or its linear's path and its name in `LinearMethod.names`.
            kind: the model's version.
        """
        return Group("", config.lr, config.weight_decay)


class LinearMethod(Method, ABC):
    """A method that puts trainable tensors beside each linear. Its functions see one linear of `in_features` inputs and
    `out_features` outputs at a time; W is that linear's weight (out_features, in_features)."""

    names: tuple[str, ...]
    """The names of its tensors within the module that `wrap` makes; in files they follow the linear's path."""
    peft_type: str
    """What HF PEFT calls the method in adapter_config.json."""
    variants: tuple[Mapping[str, Any], ...] = ({},)
    """The options of each of the method's forms that PEFT has too: `rwkv-miss bench --what methods` compares them."""
    peft_neutral: Mapping[str, Any] = {}
    """Further fields that PEFT writes there for the method, and the value at which each has no effect: another value is
    refused. A field that is neither here nor in `to_peft` is refused unless it is null, false or empty."""

    @abstractmethod
    def wrap(self, linear: FrozenLinear, config: AdapterConfig) -> nn.Module:
        """The module that takes the linear's place: it computes what the linear computes until it is trained. Its
        parameters named in `names` are trained, in fp32 beside weights of lower precision (updates of a bf16 parameter
        would be lost to rounding); the linear is its submodule `base_layer`. Buffers of the module's own hold what else
        its results depend on: a run's checkpoints have them."""

    def start(self, module: nn.Module, config: AdapterConfig) -> None:
        """Gives a module that `wrap` has made its initial values, if they are not those that it was made with. What is
        random is drawn by torch's own generator, which a run has seeded. Not called where the values come from a
        file."""

    @abstractmethod
    def shapes(self, in_features: int, out_features: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors in `names`, as an adapter's file has them."""

    def refuses(self, in_features: int, out_features: int, config: AdapterConfig) -> str | None:
        """Why the method cannot go beside a linear of that size, as text to follow the linear's path in a message; None
        if it can."""
        return None

    @abstractmethod
    def delta(self, W: Tensor, start: int, tensors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
        """What merging adds to some rows of the weight.

        Args:
            W: fp32 (M, in_features), the weight's rows from row `start` on.
            tensors: those of the linear in the adapter's file, by their names in `names`.

        Returns:
            fp32 (M, in_features), in memory of its own.
        """

    def to_file(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in `names` as an adapter's file has them, from what the module holds: its trained parameters and
        its own buffers, by their names in it."""
        return dict(held)

    def from_file(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `to_file` was given, from what it has returned."""
        return dict(tensors)

    def factors(
        self, tensors: Mapping[str, Tensor], shape: torch.Size, config: AdapterConfig, exact: bool = True
    ) -> Factors | None:
        """dW as a product, for a weight of that shape (out, in); None if it is none, or not exactly in fp32. With
        `exact` false, a scale is multiplied into B and rounded."""
        return None

    def from_factors(self, factors: Factors, config: AdapterConfig) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors in `names` whose dW is exactly that product, and the method's options with them; None if there
        are none. `config` has the rank of the product as `r`."""
        return None

    def reads(self, fields: Mapping[str, Any]) -> bool:
        """Whether an adapter_config.json with these fields is the method's: its forms may share a peft_type. Of several
        that say so, the first in `METHODS` reads it."""
        return fields.get("peft_type") == self.peft_type

    def fits_peft(self, config: AdapterConfig) -> bool:
        """Whether PEFT can load what the method alone trains with these settings. Few of its methods have several
        ranks."""
        return not config.rank_pattern

    @abstractmethod
    def to_peft(self, config: AdapterConfig) -> dict[str, Any]:
        """The method's own fields of HF PEFT's adapter_config.json."""

    @abstractmethod
    def from_peft(self, fields: Mapping[str, Any], file: str) -> dict[str, Any]:
        """The fields of `AdapterConfig` that these fields of adapter_config.json stand for, and their values.

        Raises:
            UserError: a field's value cannot be honoured; the message begins with `file`.
        """


@dataclass(frozen=True)
class Entry:
    """An entry of `METHODS`.

    module: the module whose METHOD is the method.
    settings: those optional settings of `AdapterConfig` and `TrainConfig` that the method reads although not every
        method does. Where none of a run's methods reads a setting that was given, the run is refused.
    options: the keys of `AdapterConfig.options` that it reads, and their defaults.
    """

    module: str
    settings: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


SELECTION = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "method_pattern",
    "modules_to_save",
)
"""The `Entry.settings` of a method that goes beside linears which `rwkv_miss.adapters.plan` reads for it."""

# The options of every method with a product of two thin matrices.
_LOW_RANK = {"alpha": 64.0, "rank_stabilized": False, "lr_ratio": 1.0}
METHODS: dict[str, Entry] = {
    "miss": Entry("rwkv_miss.adapters.miss", ("dropout", *SELECTION)),
    "mini": Entry("rwkv_miss.adapters.mini", ("dropout", *SELECTION), {"mini_r": 1}),
    "bat": Entry("rwkv_miss.adapters.bat", ("dropout", *SELECTION), {"layout": "output"}),
    "lora": Entry("rwkv_miss.adapters.lora", ("dropout", *SELECTION), _LOW_RANK),
    "dora": Entry("rwkv_miss.adapters.dora", ("dropout", *SELECTION), _LOW_RANK),
    "pissa": Entry("rwkv_miss.adapters.pissa", SELECTION, {**_LOW_RANK, "svd_iterations": 16}),
    "state": Entry("rwkv_miss.adapters.state", ("lr_state", "modules_to_save")),
    "full": Entry("rwkv_miss.adapters.whole"),
}
"""What `AdapterConfig.method` may name, alone or several joined by +."""


def find_methods(method: str) -> list[Method]:
    """The methods that `AdapterConfig.method` names. Every name must be in `METHODS` (`problems` checks that)."""
    return [importlib.import_module(METHODS[name].module).METHOD for name in method.split("+")]


def name_of(method: Method) -> str:
    """The method's name in `METHODS`."""
    return next(name for name in METHODS if find_methods(name) == [method])


def linear_methods(config: AdapterConfig) -> dict[str, LinearMethod]:
    """Those of the methods in `method` and `method_pattern` that go beside linears, by name, the one in `method`
    first."""
    found = {}
    for name in (*config.method.split("+"), *(config.method_pattern or {}).values()):
        [method] = find_methods(name)
        if isinstance(method, LinearMethod):
            found[name] = method
    return found


def problems(adapter: AdapterConfig, config: TrainConfig | None = None) -> list[str]:
    """A message for each setting, in `adapter` and if given in `config`, that the methods refuse or have no use for."""
    names = adapter.method.split("+")
    if not set(names) <= METHODS.keys():
        return [
            f"adapter.method is {adapter.method!r}; this version has: {', '.join(METHODS)} (several are joined by +)"
        ]
    if len(set(names)) < len(names):
        return [f"adapter.method is {adapter.method!r}; name each method once"]
    for pattern, name in (adapter.method_pattern or {}).items():
        if name not in METHODS:
            return [
                f"adapter.method_pattern gives {pattern} the method {name!r}; this version has: {', '.join(METHODS)}"
            ]
        names.append(name)
    chosen = [METHODS[name] for name in names]
    found = []
    read = {name for entry in chosen for name in entry.settings}
    for settings, prefix in ((adapter, "adapter."), (config, "")):
        for given in _optional(settings) if settings else ():
            if given not in read:
                found.append(f"{prefix}{given} is given, but adapter.method {adapter.method} has no use for it")
    known = {name: default for entry in chosen for name, default in entry.options.items()}
    for name, value in adapter.options.items():
        if name not in known:
            there = f"it has {', '.join(known)}" if known else "it has none"
            found.append(f"adapter.options has {name!r}, which is no option of method {adapter.method}; {there}")
        elif type(value) is not type(known[name]) and not (type(known[name]) is float and type(value) is int):
            found.append(f"adapter.options.{name} is {value!r}; expected {type(known[name]).__name__}")
    return found


def _optional(settings: AdapterConfig | TrainConfig) -> list[str]:
    """The given settings that not every method reads: those whose value is not the default."""
    some = {name for entry in METHODS.values() for name in entry.settings}
    return [
        f.name
        for f in fields(settings)
        if f.name in some and f.default is not MISSING and getattr(settings, f.name) != f.default
    ]


def check(adapter: AdapterConfig) -> None:
    """Raises one UserError that lists every problem of the settings of what is trained."""
    if found := adapter.problems() + problems(adapter):
        raise UserError("; ".join(found))


def option(config: AdapterConfig, name: str) -> Any:
    """The value of a method's own option: what was given, or its default."""
    names = (*config.method.split("+"), *(config.method_pattern or {}).values())
    defaults = {key: value for part in names for key, value in METHODS[part].options.items()}
    return config.options.get(name, defaults[name])
