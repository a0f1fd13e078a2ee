"""Hugging Face folders: rwkv7-hf, transformers and HF PEFT open them and compute what we compute."""

from __future__ import annotations

import json
import random

import pytest
import torch

from rwkv_miss import AdapterConfig, load_adapter, load_model, merge
from rwkv_miss.adapters.files import add_facts
from rwkv_miss.checkpoint import read_checkpoint
from rwkv_miss.cli import main
from rwkv_miss.data.rendering import chat_prompt
from rwkv_miss.data.templates import TEMPLATES
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.export.table import ADAPTER_TARGETS, TARGETS
from rwkv_miss.export.target import Runtime
from rwkv_miss.merging.alone import write_alone
from tests.helpers import save_random_adapter

TOKENS = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base(make_base):
    """With block 0's v0, v1 and v2, which released models have and a folder has no place for."""
    return make_base(n_embd=128, head_size=64, layer0_v=True)


@pytest.fixture
def no_runtime(monkeypatch):
    """Nothing is opened: without this, exports import rwkv7-hf."""
    monkeypatch.setattr(Runtime, "is_installed", False)


def assert_near(logits, expected):
    assert (logits - expected).abs().max() < 5e-6 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@torch.no_grad()
def test_rwkv7_hf_computes_the_models_logits(base, tmp_path, dtype):
    rwkv7_hf = pytest.importorskip("rwkv7_hf")
    report = merge(base, [], tmp_path / "out", dtype, target=TARGETS["hf"])
    assert report.ran.agreeing == report.ran.prompts == 8
    own = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[dtype]
    opened, info = rwkv7_hf.RWKV7ForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert opened.dtype == own
    assert opened.config.eos_token_id == opened.generation_config.eos_token_id == 0
    torch.save({key: t.to(own).float() for key, t in read_checkpoint(base).items()}, tmp_path / "rounded.pth")
    assert_near(opened.float()(TOKENS).logits, load_model(tmp_path / "rounded.pth")(TOKENS)[0])


@pytest.mark.slow
@torch.no_grad()
def test_rwkv7_hf_on_a_trained_model(tiny_model, tmp_path):
    rwkv7_hf = pytest.importorskip("rwkv7_hf")
    merge(tiny_model, [], tmp_path / "out", target=TARGETS["hf"])
    assert_near(
        rwkv7_hf.RWKV7ForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits, load_model(tiny_model)(TOKENS)[0]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(r=5, rank_pattern={"ffn.value": 7, "blocks.1.att.key": 2}),
        AdapterConfig("mini", r=6, options={"mini_r": 8}, target_modules=["att.output", "ffn.key"]),
        AdapterConfig("lora", r=3, options={"alpha": 4.0}),
    ],
)
@torch.no_grad()
def test_peft_computes_the_adapters_logits(base, tmp_path, config):
    peft, rwkv7_hf = pytest.importorskip("peft"), pytest.importorskip("rwkv7_hf")
    folder = save_random_adapter(base, tmp_path / "adapter", config)
    report = write_alone(base, folder, tmp_path / "lora", ADAPTER_TARGETS["peft-lora"])
    assert report.ran.agreeing == report.ran.prompts == 8
    assert not list(tmp_path.glob(".lora*"))
    merge(base, [], tmp_path / "hf", target=TARGETS["hf"])
    opened = peft.PeftModel.from_pretrained(
        rwkv7_hf.RWKV7ForCausalLM.from_pretrained(tmp_path / "hf"), tmp_path / "lora"
    )
    expected = load_adapter(load_model(base), folder).eval()(TOKENS)[0]
    assert_near(opened(TOKENS).logits, expected)
    assert (load_model(base)(TOKENS)[0] - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.slow
def test_what_is_opened_wrong_gets_no_name(base, tmp_path, monkeypatch):
    pytest.importorskip("rwkv7_hf")
    monkeypatch.setattr("rwkv_miss.export.hf._EPSILON", 1e-3)
    with pytest.raises(RunError, match=r"rwkv7-hf .* computes something else of the written file"):
        merge(base, [], tmp_path / "out", target=TARGETS["hf"])
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.slow
def test_transformers_reads_the_vocabulary_and_the_template(make_base, tmp_path, monkeypatch):
    transformers, rwkv7_hf = pytest.importorskip("transformers"), pytest.importorskip("rwkv7_hf")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = make_base(n_embd=64, head_size=64, vocab_size=65536)
    folder = save_random_adapter(base, tmp_path / "adapter", AdapterConfig(r=4))
    add_facts(folder, {"tokenizer": "world", "template": "g1"})
    command = ["export", f"--model={base}", f"--adapter={folder}", "--to=hf", f"--out={tmp_path / 'out'}"]
    assert main([*command, "--dtype=bf16"]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    ours = load_tokenizer("world")
    rng = random.Random(0)
    kinds = [range(128), range(0x2000), range(0x3000, 0xD800), range(0xE000, 0x20000)]
    text = (
        "".join(chr(rng.choice(kinds[i // 1000 % 4])) for i in range(8000))
        + " word by word,\n\n \r\n\t 你好。\n\n don't"
    )
    ids = ours.encode(text)
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text
    assert rwkv7_hf.RWKV7Tokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == ids
    assert tokenizer.decode([*ids[:50], 0], skip_special_tokens=True) == ours.decode(ids[:50])
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0)
    asked = [{"role": "user", "content": "What is\n\n2 + 2?"}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert prompt == chat_prompt(asked[0]["content"], TEMPLATES["g1"]) == "User: What is\n2 + 2?\n\nAssistant:"
    asked += [{"role": "assistant", "content": "4"}, asked[0]]
    assert tokenizer.apply_chat_template(asked, tokenize=False).startswith(f"{prompt} 4\n\nUser: ")


def test_the_files_of_a_folder(base, tmp_path, no_runtime):
    merge(base, [], tmp_path / "out", "f16", target=TARGETS["hf"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((tmp_path / "out/config.json").read_text())
    expected = {"model_type": "rwkv7", "architectures": ["RWKV7ForCausalLM"], "torch_dtype": "float16"}
    expected |= {"hidden_size": 128, "intermediate_size": 512, "hidden_ratio": 4.0, "num_hidden_layers": 3}
    expected |= {"head_dim": 64, "num_heads": 2, "vocab_size": 64, "value_dim": [128, 128, 128], "norm_eps": 1e-5}
    expected |= {"decay_low_rank_dim": 5, "a_low_rank_dim": 6, "v_low_rank_dim": 3, "gate_low_rank_dim": 9}
    assert {name: config[name] for name in expected} == expected
    assert (config["eos_token_id"], config["pad_token_id"], config["tie_word_embeddings"]) == (0, 0, False)


def test_what_cannot_be_held(base, make_base, random_weights6, tmp_path, no_runtime, capsys):
    torch.save(random_weights6, tmp_path / "six.pth")
    small, state = make_base("small.pth"), save_random_adapter(base, tmp_path / "state", AdapterConfig("state"))
    lora = save_random_adapter(small, tmp_path / "lora", AdapterConfig(r=4))
    refused = {
        "an RWKV-6 has no Hugging Face folder": (tmp_path / "six.pth", "hf", []),
        "the model has heads of 16": (small, "hf", []),
        "no place for a learned state (blocks.0.att.time_state)": (base, "hf", [f"--adapter={state}"]),
        "the tokenizer has 65,530 tokens, but the model 64; give --tokenizer": (base, "hf", []),
        "the model has heads of 16; ": (small, "peft-lora", [f"--adapter={lora}"]),
        "dtype is q8_0, which the format does not have": (base, "hf", ["--dtype=q8_0"]),
        "peft-lora is an adapter alone; give --adapter": (base, "peft-lora", []),
    }
    for message, (model, to, more) in refused.items():
        assert main(["export", f"--model={model}", f"--to={to}", f"--out={tmp_path / 'out'}", *more]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    assert main(["export", f"--model={base}", "--to=hf", f"--out={tmp_path / 'out'}", "--overwrite"]) == 2
    assert "exists already; give the name of a folder that does not" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*out*")) and not list((tmp_path / "out").iterdir())


def test_a_full_disk(base, tmp_path, no_runtime, full_disk):
    folder = save_random_adapter(base, tmp_path / "adapter", AdapterConfig(r=64))
    with full_disk(50_000):
        with pytest.raises(UserError, match=r"out: cannot be written"):
            merge(base, [], tmp_path / "out", target=TARGETS["hf"])
        with pytest.raises(UserError, match=r"out: cannot be written"):
            write_alone(base, folder, tmp_path / "out", ADAPTER_TARGETS["peft-lora"])
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("to", "config", "message"),
    [
        ("peft-lora", AdapterConfig("dora", r=4), r"what dora adds is no product B A; export the merged model instead"),
        ("st-lora", AdapterConfig("bat", r=8), r"what bat adds is no product B A"),
        ("peft-lora", AdapterConfig(r=4, modules_to_save=["w1"]), r"it trained blocks\.0\.att\.w1, a part of the base"),
        ("st-lora", AdapterConfig("miss+state", r=4), r"it trained blocks\.0\.att\.time_state, a learned state"),
    ],
)
def test_what_is_no_lora(base, tmp_path, to, config, message, no_runtime):
    folder = save_random_adapter(base, tmp_path / "adapter", config)
    with pytest.raises(UserError, match=message):
        write_alone(base, folder, tmp_path / "out", ADAPTER_TARGETS[to])
    assert not list(tmp_path.glob("*out*"))
