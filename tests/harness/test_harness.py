"""EleutherAI's lm-evaluation-harness finds of a model of ours what it finds of rwkv7-hf's by its own class for Hugging
Face models, and `rwkv-miss eval` finds what the harness finds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'rwkv-miss[lm_eval]'")

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean_stderr
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from rwkv_miss.cli import main
from rwkv_miss.errors import UserError
from rwkv_miss.harness.__main__ import main as command_line
from rwkv_miss.harness.model import Harness

N = 12
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: {kind}
{rest}
"""
TASKS = {
    "choices": (
        "multiple_choice",
        'doc_to_text: "User: {{question}}\\n\\nAssistant:"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]",
    ),
    "last_words": (
        "loglikelihood",
        "doc_to_text: \"{{text.split(' ')[:-1]|join(' ')}}\"\ndoc_to_target: \"{{' '+text.split(' ')[-1]}}\"\n"
        "metric_list: [{metric: perplexity}, {metric: acc}]",
    ),
    "texts": (
        "loglikelihood_rolling",
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: byte_perplexity}]',
    ),
    "written": (
        "generate_until",
        'doc_to_text: "User: {{question}}\\n\\nAssistant:"\ndoc_to_target: "{{text}}"\n'
        'generation_kwargs: {until: ["m", "s"], max_gen_toks: 12, do_sample: false}\n'
        "metric_list: [{metric: exact_match}]",
    ),
}


@pytest.fixture
def base(make_base) -> Path:
    """In rwkv7-hf the constant of a norm is BlinkDL's for heads of 64 alone."""
    return make_base(n_embd=64, head_size=64, vocab_size=256)


@pytest.fixture
def data(tmp_path) -> Path:
    rows = []
    for i in range(N):
        words = [f"w{(i % 9 + 2) * (j + 1) % 11}ö" * (1 + (i + j) % 3) for j in range(5)]
        rows.append({"question": f"which {i}?", "choices": words[:4], "answer": i % 4, "text": " ".join(words)})
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def task_manager(data, tmp_path) -> TaskManager:
    for name, (kind, rest) in TASKS.items():
        text = TASK.format(name=name, data=data, cache=tmp_path / "cache", kind=kind, rest=rest)
        (tmp_path / f"{name}.yaml").write_text(text)
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def in_transformers(path: Path) -> TemplateLM:
    """The model in rwkv7-hf, with a tokenizer whose ids are bytes; 0 ends a document."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    converter = pytest.importorskip("rwkv7_hf.converter")
    weights = torch.load(path)
    model = converter.RWKV7ForCausalLM(converter.infer_config(weights, "float32", "reference", False))
    theirs = dict(model.named_parameters())
    n_layer = len(model.model.layers)
    for name, value in weights.items():
        hf_name, transposed = converter.translate_name(name, n_layer)
        theirs[hf_name].data.copy_((value.T if transposed else value).reshape(theirs[hf_name].shape))
    # In such tokenizers a character stands for each byte: its own where it has ink, one beyond them elsewhere.
    has_ink = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [i for i in range(256) if i not in has_ink]
    characters = {i: chr(i if i in has_ink else 256 + others.index(i)) for i in range(256)}
    bytewise = Tokenizer(models.BPE({characters[i]: i for i in range(256)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    end = characters[0]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token=end, pad_token=end)
    return HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=1, device="cpu")


def measure(lm: TemplateLM, task_manager: TaskManager, *names: str) -> tuple[dict, dict]:
    """The figures of each task, and what the model answered to each record: log-likelihoods, or a text."""
    found = simple_evaluate(lm, tasks=[*names], task_manager=task_manager, bootstrap_iters=0)
    figures = {
        name: {k.partition(",")[0]: v for k, v in found["results"][name].items() if isinstance(v, float)}
        for name in names
    }
    return figures, {name: [sample["resps"] for sample in found["samples"][name]] for name in names}


@pytest.mark.slow
def test_the_harness_finds_what_it_finds_of_rwkv7_hf(base, task_manager):
    expected, answers = measure(in_transformers(base), task_manager, *TASKS)
    ours = Harness(str(base), "bytes", batch_size=5)
    figures, given = measure(ours, task_manager, *TASKS)
    assert expected["choices"].keys() == {"acc", "acc_norm"} and "byte_perplexity" in expected["texts"]
    for name in TASKS:
        assert figures[name] == pytest.approx(expected[name], rel=1e-5)
    texts = [text for [[text]] in given["written"]]
    assert given["written"] == answers["written"] and len(set(texts)) > 3
    asked = [(f"User: which {i}?\n\nAssistant:", {"max_gen_toks": 12}) for i in range(N)]
    whole = ours.generate_until([Instance("generate_until", {}, one, i) for i, one in enumerate(asked)])
    assert all(map(str.startswith, whole, texts)) and whole != texts  # a string of `until` has ended some
    for name in ("choices", "last_words", "texts"):
        found, theirs = (torch.tensor(of[name], dtype=torch.float64).flatten().tolist() for of in (given, answers))
        assert found == pytest.approx(theirs, rel=1e-5)


def test_eval_finds_what_the_harness_finds(base, data, task_manager, tmp_path, capsys):
    expected, answers = measure(Harness(str(base), "bytes"), task_manager, "choices", "last_words")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": row.pop("text")}) + "\n" for row in rows))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def evaluated(**options: object) -> tuple[dict, list[dict]]:
        argv = [f"--{name}={value}" for name, value in options.items()]
        file = tmp_path / f"{options['extract']}.jsonl"
        assert main(["eval", f"--model={base}", "--tokenizer=bytes", f"--answers={file}", "--json", *argv]) == 0
        return json.loads(capsys.readouterr().out), [json.loads(line) for line in file.read_text().splitlines()]

    found, lines = evaluated(data=data, extract="choice", batch_size=5)
    assert found["rate"] == expected["choices"]["acc"] == found["right"] / N and found["of"] == N
    assert found["by_length"]["rate"] == expected["choices"]["acc_norm"] != found["rate"]
    assert found["standard_error"] == pytest.approx(mean_stderr([line["right"] for line in lines]))
    assert [line["log_likelihoods"] for line in lines] == [
        pytest.approx([log_p for [(log_p, _)] in of_record], rel=1e-5) for of_record in answers["choices"]
    ]
    found, lines = evaluated(data=texts, extract="lambada")
    assert found["rate"] == expected["last_words"]["acc"]
    assert found["word_perplexity"] == pytest.approx(expected["last_words"]["perplexity"], rel=1e-5)
    assert [line["right"] for line in lines] == [is_likeliest for [[(_, is_likeliest)]] in answers["last_words"]]


def test_token_0_is_put_before_a_text_once(base, tmp_path):
    model, with_lead = (Harness(str(base), "bytes", lead_token=lead) for lead in (False, True))
    requests = [Instance("loglikelihood", {}, (before, "some words"), i) for i, before in enumerate(["", "a", "\0a"])]
    [nothing, a, led], found = model.loglikelihood(requests), with_lead.loglikelihood(requests)
    assert found == [nothing, pytest.approx(led), pytest.approx(led)] and a != led


@pytest.mark.parametrize(
    ("arguments", "said"), [({"batch_size": "auto"}, "batch_size is 'auto'"), ({"batch_size": 0}, "batch_size is 0")]
)
def test_wrong_arguments(base, arguments, said):
    with pytest.raises(UserError, match=said):
        Harness(str(base), "bytes", **arguments)


def test_how_answers_are_drawn(base):
    def written(seed: int = 0, **settings: object) -> list[str]:
        requests = [Instance("generate_until", {}, ("a", {"max_gen_toks": 8, **settings}), i) for i in range(3)]
        return Harness(str(base), "bytes", seed=seed).generate_until(requests)

    assert len(set(written())) == 1 and written() == written(do_sample=False, temperature=1.0)
    drawn = written(do_sample=True)
    assert len(set(drawn)) == 3 and drawn == written(do_sample=True, temperature=1.0, top_p=1.0, until="")
    assert drawn != written(do_sample=True, seed=1)


def test_settings_that_are_not_known(base):
    request = Instance("generate_until", {}, ("a", {"until": ["b"], "do_sample": True, "top_k": 5}), 0)
    with pytest.raises(UserError, match="a task sets top_k for what is written; there are do_sample"):
        Harness(str(base), "bytes").generate_until([request])


@pytest.mark.slow
def test_the_command_line_knows_the_model(base, task_manager, tmp_path, monkeypatch, capsys):
    arguments = ["run", "--model=rwkv-miss", "--tasks=choices", "--limit=3", f"--include_path={tmp_path}"]

    def run(model: Path) -> int:
        monkeypatch.setattr(sys, "argv", ["harness", *arguments, f"--model_args=model={model},tokenizer=bytes"])
        return command_line()

    assert run(base) == 0
    assert "acc_norm" in capsys.readouterr().out
    assert run(tmp_path / "none.pth") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"rwkv_miss.harness: {tmp_path}/none.pth: no such file")
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert run(base) == 2
    assert "pip install 'rwkv-miss[lm_eval]'" in capsys.readouterr().err
