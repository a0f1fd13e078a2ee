"""A model of ours as the harness wants to see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from rwkv_miss.commands.model import RunDtype, load
from rwkv_miss.data.tokenizers import END, load_tokenizer
from rwkv_miss.errors import UserError
from rwkv_miss.evaluating.answers import write
from rwkv_miss.evaluating.likelihood import likelihoods
from rwkv_miss.generation.sampling import Sampling, mixed_seed
from rwkv_miss.progress import show_progress

# What the settings of a task for written answers may hold.
_WRITING = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}


@register_model("rwkv-miss")
class Harness(TemplateLM):
    """A model that the harness measures. Its batches are those of `rwkv-miss eval`; texts are never cut on the left,
    since RWKV reads any length.

    Args:
        model: a checkpoint (.pth or .st).
        tokenizer: world, bytes, or the path of a Hugging Face tokenizer.json.
        adapter: the folder of an adapter, or of a run, to load onto the model.
        dtype: the number format that the model runs in, bf16 or fp32; that of the file when not given.
        quant: int8 or nf4 quantises the model as train does.
        lead_token: puts token 0, the end of a document, before each text, as BlinkDL's scripts do.
        batch_size: of the harness, a number.
        seed: of the answers that a task wants drawn at random.
        device, max_batch_size: of the harness; not read: the GPU is taken if there is one.

    Raises:
        UserError: an argument is wrong.
    """

    def __init__(
        self,
        model: str,
        tokenizer: str,
        adapter: str | None = None,
        dtype: RunDtype | None = None,
        quant: str = "none",
        lead_token: bool = False,
        batch_size: int | str = 32,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size is {batch_size!r}; give a number, such as 32")
        Sampling(seed=seed)  # raises for a seed out of its range
        self._batch_size = int(batch_size)
        self._lead = [END] if lead_token else []
        self._seed = seed
        self._tokenizer = load_tokenizer(tokenizer)
        self._model = load(model, adapter, dtype, quant)

    @property
    def eot_token_id(self) -> int:
        """What stands before a text that nothing stands before."""
        return END

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The token ids of a text; there are no others that could be added."""
        return self._tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text, in nats."""
        pairs = [([END], self.tok_encode(request.args[0])) for request in requests]
        return [log_p for log_p, _ in self._likelihoods(pairs)]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each text, up to a string that ends it."""
        samplings = [self._sampling(i, request.args[1]) for i, request in enumerate(requests)]
        prompts = [[*self._lead, *self.tok_encode(request.args[0])] for request in requests]
        with show_progress("answers") as report:
            return write(self._model, self._tokenizer, prompts, samplings, self._batch_size, report)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of each (context, text) with the ids of both: log p of the text, and whether the model would write it."""
        pairs = [(before if before[:1] == [END] else [*self._lead, *before], ids) for _, before, ids in requests]
        return self._likelihoods(pairs)

    def _likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        with show_progress("texts") as report:
            found = likelihoods(self._model, pairs, self._batch_size, report)
        return [(one.log_p, one.is_likeliest) for one in found]

    def _sampling(self, number: int, settings: dict[str, Any]) -> Sampling:
        """How request `number` is answered, from the settings of its task."""
        wanted = normalize_gen_kwargs(settings)
        if unknown := wanted.keys() - _WRITING:
            names = ", ".join(sorted(unknown))
            raise UserError(f"a task sets {names} for what is written; there are {', '.join(sorted(_WRITING))}")
        stop = tuple(text for text in wanted["until"] if text)
        # As in its class for Hugging Face models, what is drawn without a temperature is drawn at 1.
        temperature = wanted.get("temperature", 1.0 if wanted["do_sample"] else 0.0)
        how = temperature, wanted.get("top_p", 1.0), wanted["max_gen_toks"]
        return Sampling(*how, stop, mixed_seed(self._seed, number))
