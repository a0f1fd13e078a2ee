"""Generation and evaluation: a batch gives what its prompts give one by one, and what the full forward gives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import kl_divergence

from rwkv_miss import evaluate, load_model
from rwkv_miss.config import DataOptions
from rwkv_miss.data.documents import Document, encode_record
from rwkv_miss.data.records import Record, Turn
from rwkv_miss.data.rendering import prompt_text, render
from rwkv_miss.data.templates import TEMPLATES
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.evaluate import Answer, Evaluation, Forgetting, answers, documents_loss, forgetting, perplexity
from rwkv_miss.generation.generate import generate, stream, strip_pieces
from rwkv_miss.generation.sampling import Sampling, choose
from rwkv_miss.model.base import RWKV
from tests.scripted import Scripted

OPTIONS = DataOptions()
[STOP] = STOPS = TEMPLATES["world"].stops
BYTES = load_tokenizer("bytes")
PROMPTS = ["a", "The cat sat on", "\n\n", "in the beginning", "zz"]


def full_forward_greedy(model, prompt: str, n_tokens: int) -> str:
    """The whole text is run again for each token."""
    ids = list(prompt.encode())
    for _ in range(n_tokens):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return BYTES.decode(ids[len(prompt.encode()) :])


@pytest.fixture
def model(make_base):
    return load_model(make_base(vocab_size=256), torch.float64)


@torch.no_grad()
def test_greedy_is_the_argmax_of_the_full_forward(tiny_model):
    model = load_model(tiny_model)
    for prompt in PROMPTS[:2]:
        (text,) = generate(model, BYTES, [prompt], max_tokens=24)
        assert text == full_forward_greedy(model, prompt, 24)


def test_a_batch_is_its_prompts_one_by_one(model):
    together = generate(model, BYTES, PROMPTS, max_tokens=20)
    assert together == [generate(model, BYTES, [p], max_tokens=20)[0] for p in PROMPTS]
    assert len(set(together)) == len(PROMPTS)


def test_max_tokens_and_no_prompts(model):
    assert len(generate(Scripted(b"abcdef"), BYTES, ["q"], max_tokens=3)[0]) == 3
    assert generate(model, BYTES, [], max_tokens=3) == []


def test_the_end_of_a_document_stops_one_row_alone():
    texts = generate(Scripted(b"ab\0cd", b"uvwxyz", b"\0abc"), BYTES, ["q", "longer", "r"], max_tokens=6)
    assert texts == ["ab", "uvwxyz", ""]


def test_the_next_turn_stops():
    assert STOP == "\n\nUser:"
    said = Scripted(b"yes\n\nUser: more", b"\n\nUser:~~~~~~", "é\n\nUse\n\nUser:".encode(), b"\n\nUser ~~~~~")
    assert generate(said, BYTES, ["q"] * 4, max_tokens=14, stop=STOPS) == ["yes", "", "é\n\nUse", "\n\nUser ~~~~~~~"]


def test_the_model_is_not_run_after_every_row_has_stopped():
    steps = []
    said = Scripted(b"ab\0", b"\0", b"a" + STOP.encode())
    said.register_forward_hook(lambda *_: steps.append(1))
    generate(said, BYTES, ["q", "r", "s"], max_tokens=100, stop=STOPS)
    assert len(steps) == 8  # for each of the 8 bytes of the last


def test_sampling_is_seeded(model):
    def sample(seed: int) -> list[str]:
        return generate(model, BYTES, PROMPTS, max_tokens=12, temperature=1.0, top_p=0.9, seed=seed)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_each_prompt_has_random_numbers_of_its_own(model):
    options = {"max_tokens": 12, "temperature": 1.0, "top_p": 0.9, "seed": 3}
    together = generate(model, BYTES, ["a", "b", "a", "a"], **options)
    assert together[0] == generate(model, BYTES, ["a"], **options)[0]
    assert together[:2] == generate(model, BYTES, ["a", "b"], **options)
    assert len({together[0], together[2], together[3]}) == 3
    for seed in range(3, 7):  # nor are they those of the seeds nearby
        assert seed == 3 or generate(model, BYTES, ["a"], **options | {"seed": seed})[0] not in together


def test_a_nucleus_of_one_is_greedy(model):
    greedy = generate(model, BYTES, PROMPTS, max_tokens=12)
    assert generate(model, BYTES, PROMPTS, max_tokens=12, temperature=1.0, top_p=1e-6) == greedy
    assert generate(model, BYTES, PROMPTS, max_tokens=12, temperature=1e-4) == greedy


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.85, 1.0])
def test_the_distribution_that_is_sampled(temperature, top_p):
    """Within the nucleus only, in the proportion of softmax(logits / temperature), by a chi-square bound."""
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0, 2.5])
    p = torch.softmax(logits.double() / temperature, 0).tolist()
    nucleus, mass = [], 0.0
    for i in sorted(range(5), key=lambda i: -p[i]):
        if mass >= top_p:
            break
        nucleus.append(i)
        mass += p[i]
    n = 20_000
    sampling = Sampling(temperature, top_p)
    chosen = choose(logits.expand(n, 5), [sampling] * n, [sampling.generator(logits.device)] * n)
    counts = torch.bincount(torch.tensor(chosen), minlength=5).tolist()
    assert {i for i in range(5) if counts[i]} <= set(nucleus)
    chi2 = sum((counts[i] - n * p[i] / mass) ** 2 / (n * p[i] / mass) for i in nucleus)
    assert chi2 < 25  # at most 4 degrees of freedom: p < 1e-4


@pytest.mark.parametrize(
    "arguments", [{"temperature": 1e-40}, {"temperature": 1e-320}, {"temperature": 1.0, "top_p": 1e-300}]
)
def test_the_tiniest_temperature_and_top_p_are_greedy(make_base, arguments):
    model = load_model(make_base(vocab_size=256))
    greedy = generate(model, BYTES, PROMPTS, max_tokens=5)
    assert generate(model, BYTES, PROMPTS, max_tokens=5, **arguments) == greedy


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(model, temperature):
    model.ln_out.weight.data[0] = math.nan
    with pytest.raises(RunError, match="logits are not finite"):
        generate(model, BYTES, PROMPTS, max_tokens=5, temperature=temperature)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range(model, seed):
    with pytest.raises(UserError, match=f"seed is {seed}"):
        generate(model, BYTES, ["a"], temperature=1.0, seed=seed)


def test_a_prompt_beyond_the_vocabulary(make_base):
    model = load_model(make_base(vocab_size=64))
    with pytest.raises(UserError, match=r"'ok~' has token 126, beyond the model's vocabulary of 64"):
        generate(model, BYTES, ["!", "ok~"], max_tokens=3)


@pytest.mark.parametrize(
    ("prompt", "arguments", "word"),
    [
        ("", {}, "prompt is empty"),
        ("a", {"temperature": -0.1}, "temperature -0.1"),
        ("a", {"temperature": math.nan}, "temperature nan"),
        ("a", {"top_p": 0.0}, "top_p 0.0"),
        ("a", {"top_p": 1.1}, "top_p 1.1"),
        ("a", {"max_tokens": 0}, "max_tokens 0"),
    ],
)
def test_wrong_arguments(model, prompt, arguments, word):
    with pytest.raises(UserError, match=word):
        generate(model, BYTES, [prompt], **arguments)


def test_a_stream_is_the_text(model):
    for prompt in PROMPTS:
        pieces = list(stream(model, BYTES, prompt, Sampling(1.0, 0.9, 30, (STOP,), seed=2)))
        assert "".join(pieces) == generate(model, BYTES, [prompt], 30, 1.0, 0.9, seed=2, stop=STOPS)[0]
        assert "" not in pieces
    with pytest.raises(UserError, match="prompt is empty"):
        stream(model, BYTES, "", Sampling())


@hypothesis_given(st.lists(st.text(" \n\ta\u00a0b", max_size=4)))
def test_stripped_pieces(pieces):
    stripped = list(strip_pieces(pieces))
    assert "".join(stripped) == "".join(pieces).strip()
    assert all(stripped)
    for n in range(len(pieces)):  # after every piece, all but the white space at the end has come
        assert "".join(strip_pieces(pieces[:n])) == "".join(pieces[:n]).strip()


# Evaluation


def record(question: str, answer: str) -> Record:
    return Record("here", (Turn("user", question), Turn("assistant", answer)))


RECORDS = [record("1+1?", "2"), record("a longer question", "and its answer"), Record("here", (Turn("text", "abc"),))]


def documents(records: list[Record]) -> list[Document]:
    return [encode_record(r, BYTES, 256, OPTIONS) for r in records]


@torch.no_grad()
def by_hand(*models: RWKV) -> list[tuple[int, list[Tensor]]]:
    """Each of RECORDS' tokens that carry loss, with each model's logits for it, run on that record alone."""
    found = []
    for r in RECORDS:
        ids, carries_loss = [], []
        for text, is_answer in render(r, OPTIONS):
            ids += list(text.encode())
            carries_loss += [is_answer] * len(text.encode())
        ids, carries_loss = [*ids, 0], [*carries_loss, True]
        logits = [model(torch.tensor([ids]))[0][0] for model in models]
        found += [(ids[i], [x[i - 1] for x in logits]) for i in range(1, len(ids)) if carries_loss[i]]
    return found


def mean_nll(found: list[tuple[int, list[Tensor]]], which: int) -> float:
    return -sum(logits[which].log_softmax(-1)[token].item() for token, logits in found) / len(found)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_mean_loss_is_that_of_each_record_alone(model, batch_size):
    found = by_hand(model)
    loss, n_tokens = documents_loss(model, documents(RECORDS), ctx_len=64, batch_size=batch_size)
    assert n_tokens == len(found)
    assert loss == pytest.approx(mean_nll(found, 0), rel=1e-6)
    assert perplexity(loss) == pytest.approx(math.exp(mean_nll(found, 0)), rel=1e-5)


@pytest.mark.parametrize("most_logits", [1, 5 * 256, 2**20])
def test_forgetting_is_the_divergence_of_each_record_alone(model, make_base, monkeypatch, most_logits):
    monkeypatch.setattr(evaluate, "_MAX_LOGITS", most_logits)
    base = load_model(make_base(vocab_size=256, seed=5))
    found = by_hand(base, model)
    categorical = torch.distributions.Categorical
    divergences = [kl_divergence(*(categorical(logits=x.double()) for x in logits)).item() for _, logits in found]
    said = forgetting(model, base, documents(RECORDS), ctx_len=64, batch_size=2)
    assert said.tokens == len(found)
    assert said.base_loss == pytest.approx(mean_nll(found, 0), rel=1e-6)
    assert said.loss == pytest.approx(mean_nll(found, 1), rel=1e-6)
    assert said.kl == pytest.approx(sum(divergences) / len(found), rel=1e-5)
    same = forgetting(base, base, documents(RECORDS), ctx_len=64, batch_size=2)
    assert same.kl == 0 and same.loss == same.base_loss


def test_perplexity_of_a_huge_loss():
    assert perplexity(0.0) == 1 and perplexity(1e6) == math.inf and math.isnan(perplexity(math.nan))


def test_answers_keep_the_order_of_the_records(model):
    records = [record("a question " * n, "x") for n in (3, 1, 4, 2)]
    given = answers(model, BYTES, records, OPTIONS, max_tokens=5, batch_size=3)
    assert [a.prompt for a in given] == [prompt_text(r, OPTIONS) for r in records]
    for a in given:
        assert a.given == generate(model, BYTES, [a.prompt], max_tokens=5)[0].strip()


def test_a_right_answer_is_an_equal_one():
    said = Scripted(b" 42\n\n\0", b" 41\0")
    given = answers(said, BYTES, [record("a", "42"), record("b", "42")], OPTIONS, max_tokens=9, batch_size=2)
    assert given == [Answer("User: a\n\nAssistant:", "42", "42"), Answer("User: b\n\nAssistant:", "42", "41")]
    assert [a.is_right for a in given] == [True, False]


def test_answers_end_at_the_stops_of_the_template_and_are_compared_without_thoughts():
    thinking = Record("here", (Turn("user", "a"), Turn("assistant", "42", thought="hm")))
    said = Scripted(b">\n42\0", b">\nso\n</think>\n42\n\nUser: b")  # the longest prompt, the second, is asked first
    options = DataOptions(template="g1-think")
    given = answers(said, BYTES, [thinking, record("b", "42")], options, max_tokens=40, batch_size=1)
    assert [a.prompt for a in given] == ["User: a\n\nAssistant: <think", "User: b\n\nAssistant: <think>\n</think"]
    assert [(a.expected, a.given) for a in given] == [("42", "42")] * 2


def test_a_question_that_is_answered_is_replaced_at_once():
    said = Scripted(b"long answer\0", b"b\0", b"c\0", b"dd\0", b"e\0")
    rows, done = [], []
    said.register_forward_hook(lambda _, inputs, output: rows.append(len(inputs[0])))
    records = [record("q" * (9 - i), "x") for i in range(5)]
    given = answers(said, BYTES, records, OPTIONS, max_tokens=20, batch_size=2, report=lambda *x: done.append(x))
    assert [a.given for a in given] == ["long answer", "b", "c", "dd", "e"]
    # The first question takes 12 steps; beside it the others one after the other, each read when there is a place.
    assert rows == [2, 2, *[1, 1], 2, *[1, 1], 2, 2, *[1, 1], 2, 1, 1, 1]
    assert done[0] == (0, 5) and done[-1] == (5, 5) and done == sorted(done)


def test_logits_that_are_not_finite_end_the_answers(model):
    model.ln_out.weight.data[0] = math.nan
    with pytest.raises(RunError, match="logits are not finite"):
        answers(model, BYTES, [record("a", "b")], OPTIONS, max_tokens=3, batch_size=2)


def test_the_rows_of_the_loss_are_reported(model):
    records = [record("q" * 20, "a" * 30) for _ in range(5)]
    done = []
    documents_loss(model, documents(records), ctx_len=64, batch_size=2, report=lambda *x: done.append(x))
    assert done == [(2, 5), (4, 5), (5, 5)]


def test_figures_that_json_has_no_numbers_for_are_none():
    assert Evaluation(3, math.nan, 9, None).figures() == {"records": 3, "tokens": 9, "loss": None, "perplexity": None}
    assert Evaluation(3, 1e4, 9, None).figures() == {"records": 3, "tokens": 9, "loss": 1e4, "perplexity": None}
    right, wrong = Answer("p", "a", "a"), Answer("p", "a", "b")
    found = Evaluation(4, 1.0, 9, [right, wrong, wrong, wrong]).figures()
    assert "forgetting" not in found
    found = Evaluation(4, 1.0, 9, [right, wrong, wrong, wrong], Forgetting(5, 1.0, math.inf, math.nan)).figures()
    assert found["forgetting"] == {"tokens": 5, "base_loss": 1.0, "loss": None, "kl": None}
    assert found["right"] == 1 and found["exact_match"] == 0.25 and found["perplexity"] == pytest.approx(math.e)


def test_a_right_answer_may_hold_a_blank_line():
    """What is expected is the answer as the model learned it."""
    asked = [record("a", " 4\n\n2\n")]
    [given] = answers(Scripted(b" 4\n\n2\0"), BYTES, asked, OPTIONS, max_tokens=9, batch_size=2)
    assert given == Answer("User: a\n\nAssistant:", "4\n\n2", "4\n\n2") and given.is_right
    joined = DataOptions(answer_lines="join")
    [given] = answers(Scripted(b" 4\n\n2\0"), BYTES, asked, joined, max_tokens=9, batch_size=2)
    assert given.expected == "4\n2" and not given.is_right


def test_a_loss_of_a_part_says_so(model, caplog):
    records = [Record(f"r:{n}", (Turn("user", "q"), Turn("assistant", "a" * n))) for n in (1, 90, 200)]
    records.append(Record("r:4", (Turn("user", "q" * 90), Turn("assistant", "a"))))
    documents_loss(model, documents(records[:1]), ctx_len=64, batch_size=2)
    assert "ctx_len" not in caplog.text
    documents_loss(model, documents(records), ctx_len=64, batch_size=2)
    [said] = [message for message in caplog.messages if "ctx_len" in message]
    assert "of 4 records, 2 lose their ends to ctx_len 64 and 1 have nothing left to learn" in said
    assert "with 205 of 300 loss tokens; ctx_len 220 would keep 99 %" in said
