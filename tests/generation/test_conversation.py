"""A conversation reads what training reads of the same turns, and says what a model says that reads it all at once."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterator
from itertools import islice

import pytest
import torch
from torch import Tensor

from rwkv_miss import AdapterConfig, inject, load_model
from rwkv_miss.config import DataOptions
from rwkv_miss.data.documents import encode_record
from rwkv_miss.data.records import Record, Turn
from rwkv_miss.data.rendering import chat_prompt, chat_spans, prompt_text
from rwkv_miss.data.templates import Template, find_template, recorded
from rwkv_miss.data.tokenizers import END, load_tokenizer
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.generation import conversation, engine
from rwkv_miss.generation.conversation import Conversation
from rwkv_miss.generation.sampling import Sampling
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.state import State
from rwkv_miss.training.samples import split_document
from tests.helpers import RunsCode

BYTES = load_tokenizer("bytes")
MARKED = Template(
    system="<s>{content}",
    user="<u>{content}",
    prompt="<a>",
    answer="{content}</a>",
    end="\n",
    cleans=False,
    stops=("</a>",),
)
JINJA = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}.{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# A template, and what a model writes in it: three answers with what ends them, and what they are as turns.
TALKS = {
    "world": ([" Two.\0", " Yes,\n\nit is.\n\nUser:", " x \n\0"], ["Two.", "Yes,\n\nit is.", "x"]),
    "g1": ([" Two.\0", " <think>\nhm\n</think>\nYes\n\nUser:", "x\0"], ["Two.", "<think>\nhm\n</think>\nYes", "x"]),
    "g1-think": ([">\nhm\n</think>\nTwo.\0", ">\n</think>\nYes\n\nUser:", ">a</think>x\0"], ["Two.", "Yes", "x"]),
    "g1-think-some": ([">\nhm\n</think>\nTwo.\0"] * 3, ["Two."] * 3),
    "g1-fake-think": ([">\nTwo.\0", ">\nYes\n\nUser:", "> x \0"], ["Two.", "Yes", "x"]),
    recorded(MARKED): (["Two.</a>", "Yes\0", " x</a>"], ["Two.", "Yes", "x"]),
    recorded(Template(jinja=JINJA)): (["Two.\0", "Yes\0", " x\0"], ["Two.", "Yes", "x"]),
}
QUESTIONS = ("One and\n\none?", "Is it", "And")


@pytest.fixture
def models(random_weights, random_weights6, tmp_path) -> Callable[..., RWKV]:
    """`models(version, vocab_size=256)`: a random model in float64."""

    def make(version: int, vocab_size: int = 256) -> RWKV:
        weights = random_weights(n_layer=2, n_embd=32 if version == 6 else 16, vocab_size=vocab_size)
        if version == 6:
            own = {key: weights[key] for key in ("emb.weight", "head.weight")}
            weights = random_weights6 | own
        weights["head.weight"][END] = 0  # it is never chosen greedily
        torch.save(weights, tmp_path / f"{version}.pth")
        return load_model(tmp_path / f"{version}.pth", torch.float64)

    return make


class Script:
    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def __call__(self, text: str) -> None:
        self.tokens += text.encode()

    def forget(self) -> None:
        self.tokens.clear()


@pytest.fixture
def say(monkeypatch) -> Script:
    """`say(text)`: what models write next, whatever their logits; after it they choose again."""
    script: list[int] = []
    choose = engine.choose

    def scripted(logits: Tensor, samplings, generators) -> list[int]:
        return [script.pop(0)] if script and samplings[0].max_tokens > 1 else choose(logits, samplings, generators)

    monkeypatch.setattr(engine, "choose", scripted)
    return Script(script)


@pytest.fixture
def positions() -> Iterator[list[int]]:
    """The number of tokens of each forward pass of any model."""
    found: list[int] = []

    def count(module, inputs) -> None:
        if isinstance(module, RWKV):
            found.append(inputs[0].numel())

    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    yield found
    handle.remove()


def trained_prompt(turns, question: str, options: DataOptions, tokenizer=BYTES) -> list[int]:
    """The tokens up to an answer to `question`, as training has them."""
    thought = "t" if find_template(options.template).think_prompt else ""
    record = Record("r", (*turns, Turn("user", question), Turn("assistant", "a", thought=thought)))
    return split_document(encode_record(record, tokenizer, 65536, options))[0].tolist()


@torch.no_grad()
def greedy(model: RWKV, ids: list[int]) -> list[int]:
    """The likeliest 6 tokens after `ids`; the whole sequence is run again for each."""
    ids = list(ids)
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return ids[-6:]


def answer(talk: Conversation, question: str) -> list[int]:
    return [token for piece in talk.ask(question) for token in piece.ids]


def begins(talk: Conversation, question: str) -> list[int]:
    """The first 6 tokens of an answer, which is then left."""
    return [token for piece in islice(talk.ask(question), 6) for token in piece.ids]


def asked_for(talk: Conversation, say, template: str, n: int = 3) -> None:
    for question, written in zip(QUESTIONS[:n], TALKS[template][0][:n], strict=True):
        say(written)
        answer(talk, question)


def begin(model: RWKV, template: str = "world", max_tokens: int = 40, tokenizer=BYTES, **more) -> Conversation:
    return Conversation(model, tokenizer, DataOptions(template=template), Sampling(max_tokens=max_tokens), **more)


@pytest.mark.parametrize(("template", "version"), [*((name, 7) for name in TALKS), ("world", 6), ("g1-think", 6)])
def test_what_is_read_is_what_training_reads_of_the_same_turns(models, say, tmp_path, template, version):
    model, options = models(version), DataOptions(template=template)
    opening = () if find_template(template).system is None else (Turn("system", "Be brief."),)
    talk = begin(model, template, opening=opening)
    asked_for(talk, say, template)
    said = [
        turn for q, a in zip(QUESTIONS, TALKS[template][1], strict=True) for turn in (("user", q), ("assistant", a))
    ]
    assert [turn[:2] for turn in talk.turns] == [turn[:2] for turn in opening] + said
    ids = trained_prompt(talk.turns, "last", options)
    talk.save(tmp_path / "talk.st")
    earlier = len("".join(chat_spans((*talk.turns, Turn("user", "last")), options)[:-1]).encode())
    with torch.no_grad():
        _, whole = model(torch.tensor([ids[:earlier]]))
    kept = State.load(tmp_path / "talk.st")
    for name in ("att_shift", "wkv", "ffn_shift"):
        torch.testing.assert_close(getattr(kept, name), getattr(whole, name))
    assert begins(talk, "last") == greedy(model, ids)


def test_tokens_that_would_join_across_a_border(models):
    """Two line breaks are one token of the world's, also where one ends a prompt and the other begins an answer."""
    world = load_tokenizer("world")
    model = models(7, 65536)
    form = Template(user="Q: {content}", prompt="\n", answer="\n{content}", end="\n")
    talk = begin(model, recorded(form), 6, world)
    talk.turns = (Turn("user", "q"), Turn("assistant", "a"))
    ids = trained_prompt(talk.turns, "b", DataOptions(template=recorded(form)), world)
    assert len(ids) > len(world.encode(world.decode(ids)))
    assert begins(talk, "b") == greedy(model, ids)


@pytest.mark.parametrize("template", TALKS)
def test_a_prompt_is_that_of_evaluation(template):
    options, form = DataOptions(template=template), find_template(template)
    thought = "t" if form.think_prompt else ""
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"))
    record = Record("r", (*turns, Turn("assistant", "d", thought=thought)))
    assert "".join(chat_spans(turns, options)) == prompt_text(record, options)
    assert chat_spans(turns[:1], options) == [chat_prompt("a", form)]


@pytest.mark.parametrize("end", ["\0", "\n\nUser:", " \0"])
def test_a_turn_costs_its_own_tokens(models, say, positions, end):
    """White space at an answer's end is no part of it, so that this is read once more, but not the long question."""
    talk = begin(models(7))
    say(" a long answer" + end)
    answer(talk, "a" * 500)
    del positions[:]
    say(" yes\n\nUser:")
    answer(talk, "b")
    own = len("\n\nUser: b\n\nAssistant: yes\n\nUser:")
    assert sum(positions) <= own + (len(": a long answer") if end == " \0" else 0)
    del positions[:]
    say(" no\0")
    answer(talk, "c")
    assert sum(positions) <= own


def test_thoughts_are_left_out_by_reading_the_answer_alone_again(models, say, positions):
    talk = begin(models(7), "g1-think", 60)
    for question in ("a", "b" * 500):
        say(f">\n{'hm ' * 10}\n</think>\nyes\0")
        answer(talk, question)
    del positions[:]
    say(">\n</think>\nno\0")
    answer(talk, "c")
    assert sum(positions) <= len(" yes\n\nUser: c\n\nAssistant: <think>\n</think>\nno\0")


@pytest.mark.parametrize("kept", [1, 8])
@pytest.mark.parametrize("template", ["world", "g1-think"])
def test_turns_are_taken_back(models, say, monkeypatch, template, kept):
    monkeypatch.setattr(conversation, "_KEPT", kept)
    model, options = models(7), DataOptions(template=template)
    talk = begin(model, template, opening=(Turn("system", "s"),))
    assert not talk.undo()
    asked_for(talk, say, template)
    for n in (2, 1):
        assert talk.undo() and len(talk.turns) == 1 + 2 * n
        left = talk.turns
        assert begins(talk, "else") == greedy(model, trained_prompt(left, "else", options))
        talk.turns = left
    talk.reset()
    assert talk.turns == (Turn("system", "s"),)
    assert begins(talk, "new") == greedy(model, trained_prompt(talk.turns[:1], "new", options))
    assert begin(model).undo() is False


def test_a_conversation_is_saved_and_gone_on_with(models, say, tmp_path, positions):
    path = tmp_path / "talk.st"
    talk = begin(models(7), "g1-think")
    with pytest.raises(UserError, match="no answer yet"):
        talk.save(path)
    asked_for(talk, say, "g1-think")
    talk.save(path)
    talk.save(path)  # its own kind is replaced
    said = begins(talk, "last")
    other = begin(load_model(tmp_path / "7.pth", torch.float64), "g1-think")
    del positions[:]
    other.load(path)
    assert other.turns == talk.turns[: len(other.turns)] and len(other.turns) == 6
    assert begins(other, "last") == said
    assert sum(positions) <= len("User: last\n\nAssistant: <think") + 6
    other.load(path)
    assert other.undo() and len(other.turns) == 4
    turns, talk.turns = talk.turns[:6], talk.turns[:4]
    assert begins(other, QUESTIONS[2]) == begins(talk, QUESTIONS[2])
    world = begin(models(7), "world")  # in another template all is read again
    world.load(path)
    assert begins(world, "last") == greedy(models(7), trained_prompt(turns, "last", DataOptions(template="world")))


def test_what_cannot_be_loaded(models, say, tmp_path, random_weights):
    path = tmp_path / "talk.st"
    model = models(7)
    talk = begin(model)
    asked_for(talk, say, "world", 1)
    talk.save(path)
    turns = talk.turns

    def refused(said: str, talk: Conversation = talk, path=path) -> None:
        before = talk.turns
        with pytest.raises(UserError, match=said):
            talk.load(path)
        assert talk.turns == before

    refused("no such file", path=tmp_path / "none")
    refused("another model", begin(models(6)))
    torch.save(random_weights(n_layer=2, n_embd=16, vocab_size=256, seed=5), tmp_path / "tuned.pth")
    refused("another model", begin(load_model(tmp_path / "tuned.pth", torch.float64)))
    refused("another adapter", begin(inject(load_model(tmp_path / "7.pth", torch.float64), AdapterConfig(r=4))))
    state, facts = State.load(path), conversation.state_facts(path)["conversation"]
    state.save(tmp_path / "state.st")
    refused("holds a state, but no conversation", path=tmp_path / "state.st")
    for change in (
        {"ids": []},
        {"ids": ["a"]},
        {"turns": []},
        {"turns": [["user", "a"]]},
        {"turns": [["user", "a"], ["assistant", " "]]},
        {"turns": [["user", "a"], ["assistant", 3]]},
        {"turns": 3},
        {"turns": [["user", "a", "b"]]},
    ):
        state.save(tmp_path / "damaged.st", {"conversation": json.dumps(json.loads(facts) | change)})
        refused("damaged", path=tmp_path / "damaged.st")
    state.save(tmp_path / "damaged.st", {"conversation": "[" * 100_000})
    refused("damaged", path=tmp_path / "damaged.st")
    without = json.loads(facts)
    del without["model"]
    state.save(tmp_path / "damaged.st", {"conversation": json.dumps(without)})
    refused("another model", path=tmp_path / "damaged.st")
    state.wkv[0, 0, 0, 0, 0] = math.nan
    state.save(tmp_path / "nan.st", {"conversation": facts})
    refused("not finite", path=tmp_path / "nan.st")
    (tmp_path / "code.st").write_bytes(pickle.dumps(RunsCode(tmp_path / "ran")))
    refused("not a readable safetensors file", path=tmp_path / "code.st")
    assert not (tmp_path / "ran").exists()
    before = (tmp_path / "7.pth").read_bytes()
    for other in (tmp_path / "7.pth", tmp_path / "state.st"):
        with pytest.raises(UserError, match=r"not a readable safetensors|no conversation"):
            talk.save(other)
    assert (tmp_path / "7.pth").read_bytes() == before and talk.turns == turns


@pytest.mark.parametrize("template", ["world", "g1-think"])
def test_an_answer_that_is_interrupted_stays_as_far_as_it_came(models, say, template):
    model, options = models(7), DataOptions(template=template)
    talk = begin(model, template)
    asked_for(talk, say, template, 1)
    steps = []

    def interrupt(*_) -> None:
        steps.append(1)
        if len(steps) == 20:
            raise KeyboardInterrupt

    handle = model.blocks[1].register_forward_hook(interrupt)  # in the middle of the model
    text = "and so on and so on"
    say({"world": " ", "g1-think": ">\nhm\n</think>\n"}[template] + text)
    with pytest.raises(KeyboardInterrupt):
        answer(talk, "b")
    handle.remove()
    say.forget()
    (*_, question, said) = talk.turns
    assert question == Turn("user", "b") and text.startswith(said.content) and 0 < len(said.content) < len(text)
    assert begins(talk, "c") == greedy(model, trained_prompt(talk.turns[:4], "c", options))


def test_a_loop_that_is_left(models, say):
    talk = begin(models(7))
    say(" hello there\0")
    for piece in talk.ask("a"):
        if piece.ids == (ord("t"),):
            break
    assert talk.turns == (Turn("user", "a"), Turn("assistant", "hello t"))


@pytest.mark.parametrize(
    ("template", "written"),
    [("world", " \n\0"), ("g1-think", ">\nhm\n\0"), ("g1-think", ">\nhm\n</think>\n\0"), ("g1", "<think>a</think>\0")],
)
def test_a_question_without_an_answer_is_taken_back(models, say, template, written):
    talk = begin(models(7), template, 32)
    asked_for(talk, say, template, 1)
    before = talk.turns
    say(written)
    answer(talk, "b")
    assert talk.turns == before and talk.finish == "end"
    assert len(answer(talk, "c")) == 32 and talk.finish == "max_tokens"


def test_answers_to_the_same_question_differ_by_their_seeds(models):
    def three() -> list[list[int]]:
        talk = Conversation(models(7), BYTES, DataOptions(template="world"), Sampling(1.0, 1.0, 6, seed=4))
        found = []
        for _ in range(3):
            found.append(answer(talk, "a"))
            talk.reset()
        return found

    first = three()
    assert first == three() and len(set(map(tuple, first))) == 3


def test_logits_that_are_not_finite(models):
    model = models(7)
    model.ln_out.weight.data[0] = math.nan
    talk = begin(model)
    with pytest.raises(RunError, match="logits are not finite"):
        answer(talk, "a")
    assert talk.turns == ()


def test_a_template_without_a_form_for_a_system():
    with pytest.raises(UserError, match="no form for a turn of role system"):
        chat_spans([Turn("system", "s"), Turn("user", "q")], DataOptions(template="instruction"))
