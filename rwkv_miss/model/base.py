"""What every RWKV has: an embedding, blocks and a head; the parts that the versions share, and what each version's own
file has to define.

B batch, T tokens, C = n_embd.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_miss.config import ModelConfig
from rwkv_miss.model.state import State
from rwkv_miss.ops.log_probs import target_log_probs
from rwkv_miss.ops.products import linear


class Context(NamedTuple):
    """What every layer may use beside its input activations.

    tokens: int64 (B, T), the model's input, for layers that have an embedding of their own.
    seq_start: bool (B, T), true where a document begins; None if none begins within these tokens.
    wkv_backend: which kernel computes the recurrence.
    first: what layer 0's time mix passes to all later layers, such as RWKV-7's values; None within layer 0.
    """

    tokens: Tensor
    seq_start: Tensor | None
    wkv_backend: str
    first: Tensor | None


class LayerState(NamedTuple):
    """A layer's part of `State`: att_shift (B, C), wkv (B, H, N, N) or None for the initial state, ffn_shift (B, C)."""

    att_shift: Tensor
    wkv: Tensor | None
    ffn_shift: Tensor


class TimeMixBase(nn.Module, ABC):
    """The part of a block that mixes over time.

    `time_state` is a learned initial state (H, N, N), which only models that were given one have
    (`rwkv_miss.model.initial_state`). A subclass registers it as None after all its other parameters, because
    a run's checkpoint identifies the optimizer's parameters by their order.
    """

    time_state: nn.Parameter | None

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()

    @abstractmethod
    def forward(
        self, x: Tensor, context: Context, last: Tensor, wkv: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x (B, T, C), the previous token's x (B, C) and the WKV state (B, H, N, N), None for the initial one -> the
        output (B, T, C), the last token's x (B, C), the new WKV state, and what layer 0 passes on (`Context.first`).
        """


class ChannelMixBase(nn.Module, ABC):
    """The part of a block that mixes over channels."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, x: Tensor, context: Context, last: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, C) and the previous token's x (B, C) -> the output (B, T, C) and the last token's x (B, C)."""


def stacked(*vectors: Tensor) -> Tensor:
    """n vectors (1, 1, C) as (n, C)."""
    return torch.cat(vectors).flatten(1)


def vector(n: int) -> nn.Parameter:
    """An uninitialised parameter of n channels, in the shape that checkpoints have: (1, 1, n)."""
    return nn.Parameter(torch.empty(1, 1, n))


def matrix(*shape: int) -> nn.Parameter:
    """An uninitialised parameter of that shape."""
    return nn.Parameter(torch.empty(shape))


class Block(nn.Module):
    """x += att(ln1(x)); x += ffn(ln2(x)); layer 0 first normalises the embedding with ln0."""

    def __init__(self, config: ModelConfig, layer: int, att: TimeMixBase, ffn: ChannelMixBase) -> None:
        super().__init__()
        self.layer = layer
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd)
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att = att
        self.ffn = ffn

    def forward(self, x: Tensor, context: Context, before: LayerState) -> tuple[Tensor, Tensor | None, LayerState]:
        """x (B, T, C) -> the block's output (B, T, C), what its time mix passes on (`Context.first`), and its state
        after the last token."""
        if self.layer == 0:
            x = self.ln0(x)
        out, att_shift, wkv, first = self.att(self.ln1(x), context, before.att_shift, before.wkv)
        x = x + out
        out, ffn_shift = self.ffn(self.ln2(x), context, before.ffn_shift)
        if x.shape[1] > 1:
            # Copies: views of the last tokens would keep the whole sequence's tensors until the last layer has run.
            att_shift, ffn_shift = att_shift.clone(), ffn_shift.clone()
        return x + out, first, LayerState(att_shift, wkv, ffn_shift)


class Head(nn.Linear):
    """Hidden states (B, T, C) -> logits (B, T, V); given targets, their log-probabilities (`rwkv_miss.ops.log_probs`).

    Logits that do not fit into memory at once are computed in pieces within one call: under ZeRO-3 every rank must call
    a module the same number of times, but the number of pieces differs between ranks.
    """

    def __init__(self, n_embd: int, vocab_size: int) -> None:
        super().__init__(n_embd, vocab_size, bias=False)

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, reduction: Literal["sum", "none"] = "sum"
    ) -> Tensor:
        if targets is None:
            return linear(hidden, self.weight)
        return target_log_probs(hidden, self.weight, targets, reduction)


class Sizes(NamedTuple):
    """The sizes that each version finds in its checkpoints in its own way. heads_key: the key whose shape is
    (n_head, head_size)."""

    heads_key: str
    n_head: int
    head_size: int
    low_rank: dict[str, int]


class RWKV(nn.Module, ABC):
    """A language model. `config` has its sizes; its state dict has the checkpoint's keys. Each version is a subclass,
    which holds all that is specific to it; nothing else in the package asks which version a model is.

    Args:
        wkv_backend: which kernel computes the recurrence (see `rwkv_miss.ops.BACKENDS`).
        gradient_checkpointing: keep only each block's inputs for the backward pass and compute the rest again.
    """

    version: ClassVar[int | str]
    """What `ModelConfig.version` is: 6, 7, or a variant's name."""
    op: ClassVar[str]
    """The name of the version's recurrence in `rwkv_miss.ops`."""
    time_mix: ClassVar[type[TimeMixBase]]
    channel_mix: ClassVar[type[ChannelMixBase]]
    linears: ClassVar[tuple[str, ...]]
    """The ends of the names of the linears that an adapter goes beside."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Keys that a checkpoint may hold although the model has no use for them."""
    lr_scales: ClassVar[dict[str, float]] = {}
    """Parameters of the base that are trained with another learning rate than the rest: the end of the name -> the
    factor by which the rate is multiplied."""
    key_first: ClassVar[bool]
    """Whether the WKV state is (H, N_key, N_value), the transpose of what files of learned states hold."""
    runtimes_find_state: ClassVar[bool]
    """Whether runtimes look for a learned state among the weights in the model's file."""

    fingerprint: str
    """Identifies the base (`rwkv_miss.fingerprints`); set by `load_model`."""
    adapter: object | None = None
    """What `rwkv_miss.adapters.inject` has put into the model and is in use."""
    adapters: Mapping[str, object] = {}
    """All that it was given, by name."""

    @classmethod
    @abstractmethod
    def recognises(cls, keys: Collection[str]) -> bool:
        """Whether a checkpoint with these keys is of this version."""

    @classmethod
    @abstractmethod
    def find_sizes(cls, shape: Callable[[str], torch.Size], keys: Collection[str], n_layer: int) -> Sizes:
        """The sizes that follow from a checkpoint's shapes. `shape` returns the two dimensions of a key's tensor, or
        raises UserError."""

    @classmethod
    @abstractmethod
    def default_sizes(cls, n_embd: int) -> tuple[int, dict[str, int]]:
        """dim_ffn and the widths of the low-rank matrices that BlinkDL's training code chooses for a new model."""

    @classmethod
    @abstractmethod
    def initial(
        cls, part: str, shape: torch.Size, layer: int, config: ModelConfig, rng: torch.Generator
    ) -> Tensor | None:
        """The fp32 value that a parameter of a new model begins with; see `rwkv_miss.model.init`.

        Args:
            part: its name within its block, such as `att.key.weight`.
            layer: the block's number.

        Returns:
            None for a parameter whose value is the same in every version (norms).
        """

    @classmethod
    def unused_shapes(cls, config: ModelConfig) -> dict[str, torch.Size]:
        """Shapes of the `unused` keys that a new model's file has, because other programs ask for them."""
        return {}

    def __init__(self, config: ModelConfig, wkv_backend: str = "auto", gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.wkv_backend = wkv_backend
        self.gradient_checkpointing = gradient_checkpointing
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(
            Block(config, i, self.time_mix(config, i), self.channel_mix(config, i)) for i in range(config.n_layer)
        )
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = Head(config.n_embd, config.vocab_size)

    def forward(
        self, tokens: Tensor, state: State | None = None, seq_start: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Logits of every position, and the state after the last.

        Args:
            tokens: int64 (B, T), T >= 1.
            state: what the call on the previous piece of the same sequences returned; None is the initial state: zeros,
                or what the model has learned (`rwkv_miss.model.initial_state`).
            seq_start: bool (B, T), true where a document begins: there the token shift restarts from zero, and the WKV
                state from the initial one.

        Returns:
            logits (B, T, V) in the model's dtype; the state (its gradient flows back through this call).

        Raises:
            UserError: the state is of another version, or its shape, dtype or device is not that of this call.
            ValueError: tokens are not (B, T) with T >= 1.
        """
        hidden, state = self.hidden(tokens, state, seq_start)
        return self.head(hidden), state

    def hidden(
        self, tokens: Tensor, state: State | None = None, seq_start: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """As `forward`, but returns the head's input (B, T, C) instead of the logits."""
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be (B, T) with T >= 1, found {tuple(tokens.shape)}")
        x = self.emb(tokens)
        if state is not None:
            state.check(self.config, x.shape[0], x)
        zeros = x.new_zeros(x.shape[0], x.shape[2])
        layers = state.layers() if state else [(zeros, None, zeros)] * len(self.blocks)
        context = Context(tokens, seq_start, self.wkv_backend, None)
        after = []
        for i, (block, layer) in enumerate(zip(self.blocks, layers, strict=True)):
            before = LayerState(*layer)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, first, new = checkpoint(block, x, context, before, use_reentrant=False)
            else:
                x, first, new = block(x, context, before)
            if i == 0:
                context = context._replace(first=first)
            after.append(new)
        att_shift, wkv, ffn_shift = (torch.stack(parts) for parts in zip(*after, strict=True))
        return self.ln_out(x), State(att_shift, wkv, ffn_shift, self.config.version)

    def time_mixes(self) -> list[TimeMixBase]:
        """The time mix of each layer, in order."""
        return [block.att for block in self.blocks if isinstance(block, Block)]
