"""Settings as dataclasses. The docstring under a field is its help on the command line."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

Strategy = Literal["auto", "ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]
Offload = Literal["none", "optimizer", "all"]
Quant = Literal["none", "int8", "nf4"]
Rounding = Literal["nearest", "stochastic"]
STRATEGIES, OFFLOADS, QUANTS = get_args(Strategy), get_args(Offload), get_args(Quant)
BACKENDS = ("auto", "reference", "torch", "cpu", "cuda", "cuda_scalar", "fla")
"""What can compute the recurrence; see `rwkv_miss.ops`."""
ALL_LINEAR = "all-linear"
"""`AdapterConfig.target_modules` that stands for every linear that an adapter can go beside."""


# No number of the settings is larger, but for the seed; beyond it the sizes of arrays, and fp32, overflow.
_LARGEST = {int: 1e9, float: 1e30}
_MOST_DEVICES = 1024


def value_problems(config: Any, prefix: str = "") -> list[str]:
    """What is wrong with a dataclass's values, whatever they mean: one that is missing (null in a YAML file), or a
    number that is not finite or larger than any."""
    found = []
    for f in fields(config):
        value = getattr(config, f.name)
        if value is None and "None" not in str(f.type):
            found.append(f"{prefix}{f.name} is null; give a value, or leave it out")
        elif (limit := _LARGEST.get(type(value))) and not abs(value) <= limit and f.name != "seed":
            found.append(f"{prefix}{f.name} is {value!r:.20}; it must be a number of at most {limit:.0e}")
    return found


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of an RWKV model, as its checkpoint says them."""

    version: int | str
    """6, 7, or the name of a variant."""
    n_layer: int
    n_embd: int
    n_head: int
    head_size: int
    dim_ffn: int
    vocab_size: int
    low_rank: dict[str, int] = field(default_factory=dict)
    """Widths of the model's own low-rank matrices. RWKV-7: w (decay), a (in-context rate), v (value residual), g
    (gate). RWKV-6: maa (token shift), decay."""


@dataclass
class AdapterConfig:
    """What is trained."""

    method: str = "miss"
    """miss: Matrix Shard Sharing, one trainable (r, out) matrix beside each linear; mini and bat are forms of it. lora,
    dora and pissa: the product of a trainable (out, r) and an (r, in) matrix beside each. state: the state that
    sequences begin from; it is zero at first and needs a high lr (RWKV-PEFT takes 1, falling to 0.01). full: every
    parameter of the base. Several methods are joined by +, such as miss+state. docs/methods.md compares them."""
    r: int = 64
    """Rank of the adapter beside each linear. In MiSS: the rows of the trainable matrix, and the size of the blocks
    that the input is cut into and summed over."""
    dropout: float = 0.0
    """Probability of dropping an element of the adapter's input while training."""
    target_modules: list[str] | str | None = None
    """The linears that the adapter goes beside: a list of ends of their names, such as [att.key, ffn.value], or a
    regular expression for their whole names, such as .*[.]att[.](key|value); all time-mix and channel-mix linears
    when not given, or all-linear."""
    exclude_modules: list[str] | str | None = None
    """Linears that the adapter does not go beside although target_modules means them, in the same forms."""
    layers_to_transform: list[int] | int | None = None
    """The layers, counted from 0, whose linears the adapter goes beside; all when not given."""
    layers_pattern: str | None = None
    """With layers_to_transform: what comes before the layer's number in the names of linears, as a regular expression.
    In RWKV this is blocks, and can be left out."""
    rank_pattern: dict[str, int] | None = None
    """Ranks other than r: a regular expression for the end of a linear's name -> its rank, such as {"ffn[.].*": 32}.
    The first that matches counts."""
    method_pattern: dict[str, str] | None = None
    """Methods other than method beside some linears, in the same form. HF PEFT cannot load an adapter with several
    methods, nor one of MiSS with several ranks."""
    modules_to_save: list[str] | None = None
    """Parts of the base to train beside the adapter or the state: ln (every normalisation), time (the time mix's and
    channel mix's parameters that are no linears: token shift, decay, ...), emb, head, or ends of names as in
    target_modules. HF PEFT cannot load an adapter with parameters that are not whole modules, such as time's."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options that only the chosen method has, by name."""

    def problems(self) -> list[str]:
        """Every mistake that can be told without knowing the methods (`rwkv_miss.adapters.method` knows them)."""
        found = []
        if self.r < 1:
            found.append(f"adapter.r is {self.r}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            found.append(f"adapter.dropout is {self.dropout}; it must be in [0, 1)")
        for name, without in (
            ("target_modules", "to adapt every linear"),
            ("exclude_modules", "to exclude none"),
            ("layers_to_transform", "to adapt every layer"),
            ("layers_pattern", "for blocks"),
            ("rank_pattern", "to give every linear the rank r"),
            ("method_pattern", "to have one method"),
            ("modules_to_save", "to train nothing more"),
        ):
            if getattr(self, name) in ([], {}, ""):
                found.append(f"adapter.{name} is empty; leave it out {without}")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            found.append("adapter.layers_pattern is given without layers_to_transform; give both, or neither")
        for pattern, rank in (self.rank_pattern or {}).items():
            if rank < 1:
                found.append(f"adapter.rank_pattern gives {pattern} the rank {rank}; it must be at least 1")
        for name in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "method_pattern"):
            value = getattr(self, name)
            for pattern in [value] if isinstance(value, str) else value if isinstance(value, dict) else []:
                try:
                    re.compile(pattern)
                except re.error as e:
                    found.append(f"adapter.{name}: {pattern!r} is not a regular expression ({e})")
        return found


Data = str | list[str | dict[str, str | float]]
"""What `TrainConfig.data` may be; `rwkv_miss.data.sources` reads it."""
FIELDS = ("text_field", "prompt_field", "answer_field", "choices_field")
READING = (*FIELDS, "separator")
"""The options of `DataOptions` that say how files are read, which a source may have for itself; those in `FIELDS` are
for formats with named fields."""


@dataclass(kw_only=True)
class DataOptions:
    """How data files are read, and how their records become text. Readers and templates take it whole."""

    text_field: str = "text"
    """Field of a record that holds plain text."""
    prompt_field: str | None = None
    """Field of a record that holds the prompt (question, query, instruction and prompt are found without it)."""
    answer_field: str | None = None
    """Field of a record that holds the answer (answer, response, output and completion are found without it)."""
    choices_field: str | None = None
    """Field of a record that holds the choices of a question, a list of texts. The answer is then one of them, and may
    be given as its letter or its number, which begins at 0. Without it no choices are read, except by eval's
    --extract choice, which reads the field choices."""
    template: str | None = None
    """How a record becomes text: world, g1, g1-think and others, or a .yaml or .jinja file of yours
    (docs/templates.md). When not given it is the one that the adapter was trained with, or world."""
    learn: Literal["weighted", "all", "last"] = "weighted"
    """Which of a conversation's answers carry loss. weighted: all but those to which the data give the weight 0;
    all: these too; last: the last one alone."""
    learn_thoughts: bool = True
    """Whether what the model thinks before an answer carries loss, where the template writes it."""
    separator: str | None = None
    """The text between two documents of a .txt file; without it the whole file is one document."""
    answer_lines: Literal["keep", "join"] = "keep"
    """Blank lines in answers. keep: answers are learned as they stand; a runtime that stops at a blank line cuts such
    an answer at its first one. join: each run of line breaks becomes one and the ends are stripped, as in older data
    for World models, so that no answer holds a blank line."""
    answer_end: Literal["token", "blank_line"] = "token"
    """What follows the last answer. token: token 0, the end of the document, as in BlinkDL's data. blank_line: a blank
    line and then token 0, for runtimes that stop at a blank line alone. Between turns there is always a blank line."""

    def problems(self) -> list[str]:
        """Every mistake that can be told without opening a file."""
        found = []
        if (self.prompt_field is None) != (self.answer_field is None):
            found.append("prompt_field and answer_field go together: give both, or neither")
        if self.prompt_field is not None and self.text_field != "text":
            found.append("text_field cannot be combined with prompt_field and answer_field: give one kind")
        if self.choices_field is not None and self.text_field != "text":
            found.append("text_field cannot be combined with choices_field: plain text has no choices")
        if self.separator == "":
            found.append("separator is empty; leave it out to read the whole file as one document")
        if self.learn not in ("weighted", "all", "last"):
            found.append(f"learn is {self.learn!r}; it must be weighted, all or last")
        if self.answer_lines not in ("keep", "join"):
            found.append(f"answer_lines is {self.answer_lines!r}; it must be keep or join")
        if self.answer_end not in ("token", "blank_line"):
            found.append(f"answer_end is {self.answer_end!r}; it must be token or blank_line")
        return found

    def of_data(self) -> DataOptions:
        """These options alone, of settings that have others too."""
        return DataOptions(**{f.name: getattr(self, f.name) for f in fields(DataOptions)})


def _quant_problems(config: TrainConfig | EvalConfig | ServeConfig) -> list[str]:
    if config.quant not in QUANTS:
        return [f"quant is {config.quant!r}; it must be one of {', '.join(QUANTS)}"]
    if config.quant == "none" and config.quant_skip is not None:
        return ["quant_skip is given without quant; give both, or neither"]
    return []


@dataclass
class TrainConfig(DataOptions):
    """Fine-tune an RWKV-6 or RWKV-7 checkpoint: an adapter such as MiSS, its initial state, or all of its weights."""

    base: str
    """The base checkpoint (.pth or .st) in BlinkDL's layout."""
    data: Data
    """Training data: a file (.jsonl, .json, .csv, .tsv, .txt, these as .gz or .zst, .parquet, .arrow), a folder or a
    pattern such as 'parts/*.jsonl', a binidx (PREFIX of .bin and .idx), or OWNER/NAME:SPLIT of the Hugging Face hub.
    Several are parted by commas, each with a weight if you like: a.jsonl:2,b.csv gives every row of a.jsonl twice an
    epoch. In a YAML file also a list, whose entries may be objects: path, weight, and text_field, prompt_field,
    answer_field and separator of their own."""
    tokenizer: str
    """world, bytes, or the path of a Hugging Face tokenizer.json; with a binidx, the one that made its ids."""
    out: str
    """Output folder: adapter/, checkpoints/, report.html, metrics.csv, tensorboard/, config.yaml, run.json."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """The adapter."""
    adapter_from: str | None = None
    """The folder of an adapter, ours or HF PEFT's, or of a run, to train on from; its settings take the place of
    adapter's."""
    packing: bool = True
    """Lay several documents into one row, each with a state of its own; false gives every document a row."""
    val_data: Data | None = None
    """Validation data, as data but without weights."""
    val_split: float = 0.0
    """Share of the training data held out for validation (0 to 1), when val_data is not given."""
    val_every: int = 0
    """Optimizer steps between validations; 0 validates at the end of each epoch."""
    ctx_len: int = 512
    """Tokens in a row."""
    long_documents: Literal["cut", "carry"] = "cut"
    """What becomes of a question and answer longer than ctx_len. cut: its end is left out; carry: the rest goes on in
    further rows, each with a fresh state. Plain text always goes on. To carry the state too, raise ctx_len and give
    chunk_len."""
    allow_dropping: bool = False
    """Train even if ctx_len cuts or drops more than half of the records; false ends the run with an error that says
    which ctx_len would keep them."""
    chunk_len: int | None = None
    """Run rows in chunks of this many tokens and carry the state from each to the next: ctx_len can then be the
    length of the longest document, whatever it is. Rows are run whole when not given."""
    bptt_chunks: int = 0
    """With chunk_len: cut the gradient after every so many chunks, so that memory does not grow with ctx_len. 0 never
    cuts it: gradients are exact, and chunks are run a second time in the backward pass."""
    batch_size: int = 8
    """Rows in a micro-batch, on each device."""
    accumulate: int = 1
    """Micro-batches in an optimizer step, on each device."""
    epochs: int = 1
    """Full passes over the data."""
    max_steps: int = 0
    """Optimizer steps in all, over as many epochs as that takes; 0 leaves it to epochs."""
    lr: float = 2e-5
    """Peak learning rate. If the base's own parameters are trained, the bias of the decay (att.w0, in RWKV-6
    att.time_decay) has twice this rate."""
    lr_state: float | None = None
    """Peak learning rate of the state; lr when not given. Give it with miss+state: a state needs a far higher rate than
    MiSS."""
    lr_min: float = 0.0
    """Learning rate at the end of the schedule, as a share of the peak."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning rate after the warm-up. wsd: constant, then linear decay over the last decay_share."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises linearly from 0."""
    decay_share: float = 0.2
    """Share of all steps that the wsd schedule decays over."""
    weight_decay: float = 0.0
    """AdamW's weight decay, on MiSS's matrices and states; of the base's own parameters, only on matrices whose
    names end in .weight."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's betas."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    gradient_checkpointing: bool = False
    """Compute each block again in the backward pass instead of keeping its activations."""
    quant: Quant = "none"
    """Store the weights of the base's frozen linears in fewer bits, by bitsandbytes: int8, or nf4 (4 bits). Each is
    quantised as it is read. The embedding, the head and the model's own low-rank matrices stay as they are."""
    quant_skip: list[str] | None = None
    """With quant: linears that are not quantised, such as [att.key, att.value]. When not given: [att.value, att.output]
    with nf4, none with int8."""
    precision: str = "auto"
    """Dtype of the frozen weights and the activations: bf16, fp32, or auto, which keeps the base's. What is trained is
    always fp32."""
    devices: int = 1
    """GPUs to use on each node; processes on a machine without a GPU."""
    num_nodes: int = 1
    """Number of machines."""
    strategy: Strategy = "auto"
    """How processes share the work. auto: one process alone, ddp for several."""
    offload: Offload = "none"
    """What DeepSpeed keeps in the CPU's memory. optimizer: AdamW's state, and its step is computed there; all: also the
    weights that are not in use (stage 3)."""
    deepspeed_config: str | None = None
    """A JSON file of further DeepSpeed settings, such as bucket sizes. What the options here decide is to be left out
    of it, or "auto"."""
    meet_minutes: float = 10.0
    """Minutes that the processes of several machines wait for each other at the start before the run is given up."""
    hang_minutes: float = 30.0
    """Minutes after which a run of several processes, none of which goes on, is given up."""
    wkv_backend: str = "auto"
    """Kernel of the recurrence: auto, cuda (NVIDIA GPUs; for RWKV-7 in bf16 on tensor cores, where it can),
    cuda_scalar (NVIDIA GPUs, without tensor cores), fla (flash-linear-attention, any GPU that Triton supports),
    cpu (C++), torch, or reference (slow, for checks)."""
    objective: str = "cross_entropy"
    """What is minimised. cross_entropy: the mean of -log p over the tokens that carry loss."""
    seed: int = 42
    """Seed of the order of the data, the validation split and dropout."""
    loggers: list[str] = field(default_factory=lambda: ["csv", "tensorboard"])
    """Where the run's figures are written. csv (metrics.csv) and tensorboard (tensorboard/) are there always; wandb
    adds Weights & Biases, which needs no network with WANDB_MODE=offline."""
    log_every: int = 10
    """Optimizer steps between the rows of metrics.csv."""
    sample_every: int = 0
    """Optimizer steps between sample answers of the model, which are shown and written to samples.jsonl, also before
    the first step and after the last; 0 asks for none."""
    sample_count: int = 3
    """How many samples: documents of the validation data, or of the training data where nothing validates. Each is
    answered from its last question, plain text is continued."""
    sample_tokens: int = 100
    """The most tokens that a sample answer may have."""
    save_every: int = 0
    """Optimizer steps between checkpoints; 0 saves at the end of each epoch. One is also saved before a validation."""
    save_minutes: float = 10.0
    """A checkpoint is also saved when this many minutes have gone by without one; 0 never does so."""
    keep: int = 1
    """How many checkpoints are kept, the newest ones."""
    resume: Literal["never", "auto"] = "never"
    """auto goes on from the output folder's last checkpoint, or starts a new run if there is none."""
    overwrite: bool = False
    """Replace what an earlier run left in the output folder."""

    def problems(self) -> list[str]:
        """Every mistake that can be told without opening a file."""
        found = super().problems()
        if self.devices > _MOST_DEVICES:
            found.append(f"devices is {self.devices}; no machine has more than {_MOST_DEVICES}")
        if not self.out:
            found.append("out is empty; give a folder")
        for name in (
            *("ctx_len", "batch_size", "accumulate", "epochs", "devices", "num_nodes", "log_every", "keep"),
            *("sample_count", "sample_tokens"),
        ):
            if getattr(self, name) < 1:
                found.append(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in (
            "bptt_chunks",
            "max_steps",
            "warmup_steps",
            "val_every",
            "save_every",
            "sample_every",
            "weight_decay",
            "grad_clip",
            "seed",
            "save_minutes",
        ):
            if getattr(self, name) < 0:
                found.append(f"{name} is {getattr(self, name)}; it cannot be negative")
        if self.seed >= 2**32:
            found.append(f"seed is {self.seed}; it must be below 2^32")
        if not all(0 <= beta < 1 for beta in self.betas):
            found.append(f"betas are {list(self.betas)}; both must be in [0, 1)")
        for name in ("lr_min", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        if not 0 <= self.val_split < 1:
            found.append(f"val_split is {self.val_split}; it must be in [0, 1)")
        for name in ("lr", "lr_state", "meet_minutes", "hang_minutes"):
            if (value := getattr(self, name)) is not None and not value > 0:
                found.append(f"{name} is {value}; it must be above 0")
        if self.adapter_from is not None and self.adapter != AdapterConfig():
            found.append("adapter_from is given, whose folder has its own settings; leave those of adapter out")
        if self.val_data and self.val_split:
            found.append("val_data and val_split are both given; choose one")
        if self.val_every and not (self.val_data or self.val_split):
            found.append("val_every is given but there is nothing to validate on; give val_data or val_split")
        if self.resume == "auto" and self.overwrite:
            found.append("resume and overwrite are both given; choose one")
        if self.precision == "fp16":
            found.append("precision is fp16, whose values end at 65,504, less than training reaches; give bf16 or fp32")
        elif self.precision not in ("auto", "bf16", "fp32"):
            found.append(f"precision is {self.precision!r}; it must be auto, bf16 or fp32")
        found += _quant_problems(self)
        if self.quant != "none" and self.offload == "all":
            found.append(f"offload is all, but weights in {self.quant} stay on the GPU; give offload optimizer")
        for name in ("offload", "deepspeed_config"):
            if getattr(self, name) not in ("none", None) and not self.strategy.startswith("deepspeed"):
                found.append(f"{name} is given, but strategy is {self.strategy}; give one of DeepSpeed's")
        if self.offload == "all" and self.strategy.startswith("deepspeed") and self.strategy[-1] != "3":
            found.append(f"offload is all, but {self.strategy} keeps whole weights on the GPU; give deepspeed_stage_3")
        if self.wkv_backend not in BACKENDS:
            found.append(f"wkv_backend is {self.wkv_backend!r}; it must be one of {', '.join(BACKENDS)}")
        if self.chunk_len is None:
            if self.bptt_chunks:
                found.append("bptt_chunks is given without chunk_len; give both, or neither")
        elif self.chunk_len < 1:
            found.append(f"chunk_len is {self.chunk_len}; it must be at least 1, or be left out to run rows whole")
        elif self.chunk_len >= self.ctx_len:
            found.append(
                f"chunk_len is {self.chunk_len} and ctx_len {self.ctx_len}, so there is nothing to cut; raise ctx_len "
                "to the tokens of the longest document, or leave chunk_len out"
            )
        return found

    @property
    def window_len(self) -> int | None:
        """Columns of a row between two places where the gradient is cut (a window of truncated back-propagation
        through time); None if it is not cut."""
        return self.chunk_len * self.bptt_chunks if self.chunk_len and self.bptt_chunks else None


@dataclass(kw_only=True)
class PlanConfig(TrainConfig):
    """Tell how much memory a run takes, before anything is loaded: the options are those of train."""

    base: str = ""
    """The base checkpoint, of which only the sizes are read; not needed with shape."""
    data: Data = ""
    """Not read: every row is taken to be full, and every token to carry loss."""
    tokenizer: str = "world"
    """Not read."""
    out: str = "out"
    """Not written."""
    shape: str | None = None
    """A released model whose sizes are taken instead of a file's: of RWKV-7 0.1b, 0.4b, 1.5b, 2.9b (or 3b), 7.2b (7b)
    and 13.3b (13b), of RWKV-6 1.6b, 3b, 7b and 14b."""
    version: int = 7
    """Version of RWKV that shape is of: 6 or 7."""
    gpu_memory: str | None = None
    """Memory of a GPU, such as 24GB as its name says it (1 GB is 2^30 bytes): tells the largest batch_size that fits,
    or what to change. wkv_backend cpu plans for a machine without a GPU, whose memory this is then."""
    json: bool = False
    """Print one JSON object instead of text."""

    def problems(self) -> list[str]:
        """Every mistake that can be told without opening a file."""
        found = super().problems()
        if not self.shape and not self.base:
            found.append("neither shape nor base is given; give --shape 1.5b, or a checkpoint as --base")
        return found


@dataclass(kw_only=True)
class PreviewConfig(TrainConfig):
    """Show data as the model will see them, before anything is trained: the options are those of train."""

    base: str = ""
    """The base checkpoint, of which only the sizes are read, unless ask_base is given; without it the tokenizer's
    vocabulary is taken."""
    out: str = "out"
    """Not written. If a run is there already, its speed tells how long this one will take."""
    records: int = 5
    """How many records to show: the first ones."""
    limit: int | None = None
    """Take all figures from this many records (of a binidx: documents), the first ones; from all when not given."""
    token_ids: bool = False
    """Also show the token ids of the records."""
    ask_base: bool = False
    """Load the base, and let it read up to 16 records: does it know the template?"""
    html: str | None = None
    """Write all of it as one page, which needs nothing else, to this file as well."""
    overwrite: bool = False
    """Replace the page if it is there already."""
    json: bool = False
    """Print one JSON object instead of text."""

    def problems(self) -> list[str]:
        """Every mistake that can be told without opening a file."""
        found = super().problems()
        if self.records < 0:
            found.append(f"records is {self.records}; it cannot be negative")
        if self.limit is not None and self.limit < 1:
            found.append(f"limit is {self.limit}; it must be at least 1, or be left out for all records")
        if self.ask_base and not self.base:
            found.append("ask_base is given without a base; give --base")
        return found


@dataclass(kw_only=True)
class EvalConfig(DataOptions):
    """Measure a model's loss and perplexity on data, and how many of its answers are right."""

    model: str
    """A checkpoint (.pth or .st)."""
    data: Data
    """Files, folders or a binidx, as for train but without weights."""
    tokenizer: str
    """world, bytes, or the path of a Hugging Face tokenizer.json."""
    adapter: str | None = None
    """The folder of an adapter, or of a run, to load onto the model."""
    exact_match: bool = False
    """Also let the model answer every question and count the answers equal to the data's."""
    extract: str | None = None
    """As exact_match, but compares what is found in the model's answer with what is found in the data's. gsm8k: what
    follows ####; last_number; json: the answer as a JSON value; regex:PATTERN: the first match, or its first group. Two
    let the model write nothing. choice: it chooses the likeliest of a record's choices. lambada: the last word of each
    text after the rest of it. docs/evaluating.md has an example of each."""
    samples: int = 1
    """Answers to each question, drawn at random; more than 1 need a temperature above 0."""
    pass_at: list[int] | None = None
    """Also estimate, for each of these numbers k, such as [1,5], how often one of k answers is right; samples must be
    at least as many."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above 0, tokens of answers are drawn at random."""
    top_p: float = 1.0
    """Draw among the likeliest tokens whose probabilities sum to this."""
    seed: int = 0
    """Seed of the random sampling. Each answer has random numbers of its own, whatever batch_size is."""
    lead_token: bool = False
    """With extract choice and lambada: put token 0, the end of a document, before each prompt, as BlinkDL's scripts
    do."""
    answers: str | None = None
    """With exact_match or extract: write every answer to this .jsonl file."""
    overwrite: bool = False
    """Replace the file of answers if it is there already."""
    forgetting: str | None = None
    """The base that the model was tuned from (.pth or .st): also say how much of it the tuning has changed, by the
    losses of both on `text` and the KL divergence between them."""
    text: Data | None = None
    """With forgetting: text of the kind that the base was trained on, given as data is."""
    limit: int | None = None
    """Use only this many records (of a binidx: documents) of data and of text, the first ones."""
    ctx_len: int = 512
    """Tokens in a row when the loss is computed; longer conversations lose their ends."""
    batch_size: int = 32
    """Rows (for the loss) or questions (for their answers) that run together."""
    max_tokens: int = 256
    """The most tokens that an answer may have."""
    show: int = 3
    """How many answers to print."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Number format that the model runs in; that of the file when not given."""
    quant: Quant = "none"
    """int8 or nf4: quantise the model as train does, to see what an adapter has been trained on."""
    quant_skip: list[str] | None = None
    """As for train."""
    json: bool = False
    """Print one JSON object instead of text."""

    def problems(self) -> list[str]:
        """Every mistake that can be told without opening a file."""
        if found := value_problems(self):
            return found
        found = super().problems() + _quant_problems(self)
        if (self.forgetting is None) != (self.text is None):
            found.append("forgetting and text go together: give the base and its text, or neither")
        for name in ("limit", "ctx_len", "batch_size", "max_tokens", "samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                found.append(f"{name} is {value}; it must be at least 1")
        if self.exact_match and self.extract is not None:
            found.append("exact_match and extract are both given; choose one")
        if not self.exact_match and self.extract is None:
            for name in ("samples", "pass_at", "temperature", "top_p", "answers"):
                if getattr(self, name) != getattr(EvalConfig, name):
                    found.append(f"{name} is given, but no answers are asked for; give exact_match or extract")
        if not self.temperature >= 0:
            found.append(f"temperature is {self.temperature}; it cannot be negative")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            found.append(f"seed is {self.seed}; it must be from 0 to 2^63 - 1")
        if self.samples > 1 and self.temperature == 0:
            found.append(f"samples is {self.samples}, but with temperature 0 they are all the same; give a temperature")
        if self.pass_at == []:
            found.append("pass_at is empty; leave it out")
        for k in self.pass_at or []:
            if not 1 <= k <= self.samples:
                found.append(f"pass_at has {k}; it must be from 1 to samples, which is {self.samples}")
        return found


@dataclass(kw_only=True)
class ServeConfig:
    """Serve a model, and any number of adapters on it, by OpenAI's HTTP API, with a page to try them."""

    model: str
    """A checkpoint (.pth or .st)."""
    tokenizer: str
    """world, bytes, or the path of a Hugging Face tokenizer.json."""
    name: str = "base"
    """What requests call the model."""
    adapter: list[str] | None = None
    """NAME=FOLDER: an adapter, or a run whose adapter is taken, and what requests call it. Give it once for each."""
    template: str | None = None
    """As for train: of the model, and of adapters with which none is recorded; world when not given."""
    host: str = "127.0.0.1"
    """The address to listen at. Any but this machine's own needs an api_key_file."""
    port: int = 8000
    """The port to listen at."""
    api_key_file: str | None = None
    """A file that holds the key which requests have to send."""
    allow_adapter_changes: bool = False
    """Let requests load and unload adapters, from any folder of this machine."""
    max_batch: int = 64
    """The most answers that are written at once; further ones wait."""
    max_waiting: int = 256
    """The most answers that wait; further ones are refused (429)."""
    max_tokens: int = 4096
    """The most tokens of an answer."""
    max_prompt_tokens: int = 65536
    """The most tokens of a prompt."""
    max_body_bytes: int = 1_048_576
    """The most bytes of a request."""
    timeout: float = 600
    """The most seconds that a request may take."""
    prefix_cache: int = 256
    """MB of states kept of what has been read: a prompt that begins with it, such as the next question of a
    conversation, is read from there on. 0: none."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Number format that the model runs in; that of the file when not given."""
    quant: Quant = "none"
    """int8 or nf4: quantise the model as train does."""
    quant_skip: list[str] | None = None
    """As for train."""

    def problems(self) -> list[str]:
        """Every mistake that can be told without opening a file."""
        if found := value_problems(self):
            return found
        found = _quant_problems(self)
        names = [self.name]
        for given in self.adapter or ():
            name, equals, folder = given.partition("=")
            if not (name and equals and folder):
                found.append(f"adapter is {given!r}; give it as NAME=FOLDER")
            elif name in names:
                found.append(f"the name {name!r} is given twice; give each model another")
            names.append(name)
        if not self.name:
            found.append("name is empty; give the model one")
        if not 0 < self.port < 65536:
            found.append(f"port is {self.port}; it must be from 1 to 65535")
        if self.api_key_file is None and not is_loopback(self.host):
            found.append(f"host is {self.host!r}, which other machines may reach; give a key in a file: --api_key_file")
        for name in ("max_batch", "max_tokens", "max_prompt_tokens", "max_body_bytes"):
            if (value := getattr(self, name)) < 1:
                found.append(f"{name} is {value}; it must be at least 1")
        for name in ("max_waiting", "prefix_cache"):
            if (value := getattr(self, name)) < 0:
                found.append(f"{name} is {value}; it cannot be negative")
        if not self.timeout > 0:
            found.append(f"timeout is {self.timeout:g}; it must be above 0")
        return found

    def adapters(self) -> dict[str, str]:
        """The folders of the adapters by their names."""
        return {name: folder for name, _, folder in (given.partition("=") for given in self.adapter or ())}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens at the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False
