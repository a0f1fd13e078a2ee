"""The forms of MiSS beside the standard one, and all of them in whole models: outputs, gradients and merged weights
against HF PEFT, dense formulas and finite differences."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rwkv_miss import AdapterConfig, inject, load_adapter, load_model, merge, save_adapter
from rwkv_miss.adapters import bat
from rwkv_miss.adapters.inject import installed, trained_parameters
from rwkv_miss.adapters.method import find_methods
from rwkv_miss.errors import UserError
from rwkv_miss.model.linear import Linear

TOKENS = torch.randint(64, (2, 13), generator=torch.Generator().manual_seed(0))
# n_embd is 32 and dim_ffn 128 or 96. Ranks that divide the inputs and that do not, and columns that divide outputs.
FORMS = {
    "standard": AdapterConfig(r=8),
    "standard, ragged": AdapterConfig(r=5),
    "mini": AdapterConfig("mini", r=8, options={"mini_r": 4}),
    "mini, ragged": AdapterConfig("mini", r=7, options={"mini_r": 16}),
    "bat": AdapterConfig("bat", r=4),
    "bat, one group": AdapterConfig("bat", r=32),
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def adapted(config: AdapterConfig, n_in: int, out: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A linear with an adapter that is not zero."""
    linear = Linear(n_in, out)
    linear.weight = nn.Parameter(normal(out, n_in, seed=1, dtype=dtype), requires_grad=False)
    [method] = find_methods(config.method)
    assert method.refuses(n_in, out, config) is None
    layer = method.wrap(linear, config)
    layer.miss_block.data.copy_(0.3 * normal(*layer.miss_block.shape, seed=2))
    return layer


def dense_delta(W: Tensor, block: Tensor, config: AdapterConfig) -> Tensor:
    """dW entry by entry."""
    r, layout = config.r, config.options.get("layout", "output")
    dW = torch.empty_like(W)
    for o in range(len(W)):
        for c in range(W.shape[1]):
            if block.ndim == 2:
                dW[o, c] = block[c % r, o % block.shape[1]]
            else:
                B = block[(o if layout == "output" else c) // r]
                i = c // r
                dW[o, c] = W[o, i * r : (i + 1) * r] @ B[:, c % r] + B[o % r, c % r]
    return dW


def randomise(model):
    rng = torch.Generator().manual_seed(5)
    for p in trained_parameters(model).values():
        p.data.normal_(0, 0.05, generator=rng)
    return model.eval()


SMALL = [
    (AdapterConfig("mini", r=3, options={"mini_r": 2}), 7, 6),
    (AdapterConfig("mini", r=4, options={"mini_r": 3}), 8, 6),
    (AdapterConfig("bat", r=3), 6, 12),
    (AdapterConfig("bat", r=3, options={"layout": "input"}), 6, 12),
    (AdapterConfig("bat", r=2, options={"layout": "input"}), 8, 4),
]


@pytest.mark.parametrize(("config", "n_in", "out"), SMALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_outputs_and_gradients_of_the_dense_formula(config, n_in, out, dtype, monkeypatch):
    monkeypatch.setattr(bat, "_PIECE", 40)  # several pieces
    layer = adapted(config, n_in, out, dtype)
    x, W = normal(2, 5, n_in, dtype=dtype).requires_grad_(), layer.base_layer.weight.double()
    block = layer.miss_block.detach().double().requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    exact = exact_x @ (W + dense_delta(W, block, config)).T
    y, dy = layer(x), normal(2, 5, out, seed=3)
    assert y.dtype == dtype
    found = [y, *torch.autograd.grad(y, (x, layer.miss_block), dy.to(dtype))]
    expected = [exact, *torch.autograd.grad(exact, (exact_x, block), dy.to(dtype).double())]
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.double() - theirs).norm() <= (1e-13 if dtype == torch.float64 else 2e-2) * theirs.norm()


@pytest.mark.parametrize(("config", "n_in", "out"), SMALL)
def test_what_is_merged_whatever_rows_it_is_asked_for(config, n_in, out):
    layer = adapted(config, n_in, out, torch.float32)
    W, block = layer.base_layer.weight.detach(), layer.miss_block.detach()
    [method] = find_methods(config.method)
    exact = dense_delta(W.double(), block.double(), config)
    for step in (1, 2, out):
        pieces = [method.delta(W[i : i + step], i, {"miss_block": block}, config) for i in range(0, out, step)]
        assert torch.allclose(torch.cat(pieces).double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["output", "input"])
def test_finite_differences_with_dropout(layout):
    """For one fixed mask that is passed in."""
    layer = adapted(AdapterConfig("bat", r=2, options={"layout": layout}), 4, 6)
    x, B = normal(2, 3, 4).requires_grad_(), layer.miss_block
    keep = normal(6, 4, seed=4) > 0
    assert torch.autograd.gradcheck(
        lambda x, B: bat._BatFunction.apply(x, layer.base_layer, B, layout, keep, 2.5), (x, B)
    )


@pytest.mark.parametrize("method", ["mini", "bat"])
def test_dropout_is_for_training_alone(method):
    layer = adapted(AdapterConfig(method, r=4, dropout=0.5, options={"mini_r": 4} if method == "mini" else {}), 16, 8)
    x = normal(5, 16)
    torch.manual_seed(0)
    assert not torch.equal(layer(x), layer.eval()(x))
    assert torch.equal(layer(x), layer(x))
    full, base = layer(x) - layer.base_layer(x), layer.base_layer(x)
    layer.train()
    mean = torch.stack([layer(x) - base for _ in range(4000)]).mean(0)
    assert (mean - full).norm() < 0.1 * full.norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_computes_the_base(either_base, form, dtype):
    with torch.no_grad():
        expected = load_model(either_base, dtype)(TOKENS)[0]
        assert torch.equal(inject(load_model(either_base, dtype), FORMS[form])(TOKENS)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_hf_peft_reads_ours_and_we_read_theirs(either_base, form, tmp_path):
    """Logits, gradients and merged weights in fp32, of a whole model; the file that PEFT writes trains on here."""
    peft = pytest.importorskip("peft")
    model = randomise(inject(load_model(either_base), FORMS[form]))
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(load_model(either_base), tmp_path / "ours", is_trainable=True).eval()
    gradients = {}
    for which in (model, theirs):
        logits = which(TOKENS)[0]
        logits.square().mean().backward()
        gradients[which] = [logits.detach(), *(p.grad for p in which.parameters() if p.requires_grad)]
    for mine, exact in zip(gradients[model], gradients[theirs], strict=True):
        assert (mine - exact).norm() <= 2e-5 * exact.norm()

    theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs/adapter_config.json").read_text())["peft_type"] == "MISS"
    again = load_adapter(load_model(either_base), tmp_path / "theirs").eval()
    assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])
    assert installed(again).config.method == FORMS[form].method and installed(again).config.r == FORMS[form].r
    merge(either_base, tmp_path / "theirs", tmp_path / "merged.pth")
    merged, exact = load_model(tmp_path / "merged.pth"), theirs.merge_and_unload().state_dict()
    for key, tensor in merged.state_dict().items():
        assert (tensor - exact[key]).norm() <= 1e-6 * exact[key].norm(), key


def test_peft_cannot_say_the_input_layout(either_base, tmp_path):
    """Such a folder has a type of ours, so that PEFT refuses it; here it is loaded and merged as it was."""
    config = AdapterConfig("bat", r=8, options={"layout": "input"})
    model = randomise(inject(load_model(either_base), config))
    save_adapter(model, tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert written["peft_type"] == "RWKV_MISS" and written["options"] == {"layout": "input"}
    again = load_adapter(load_model(either_base), tmp_path / "adapter").eval()
    assert torch.equal(again(TOKENS)[0], model(TOKENS)[0]) and installed(again).config.options == config.options
    assert merge(either_base, tmp_path / "adapter", tmp_path / "merged.pth").logits_error < 1e-5


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            AdapterConfig("mini", r=4, options={"mini_r": 5}),
            "mini_r is 5, which does not divide the linear's 32",
        ),
        (AdapterConfig("mini", r=4, options={"mini_r": 0}), "mini_r is 0"),
        (AdapterConfig("mini", r=33), "r is 33 but the linear has only 32 inputs"),
        (AdapterConfig("bat", r=5), "r is 5, which does not divide both sizes of the linear, 32 -> 32"),
        (AdapterConfig("bat", r=4, options={"layout": "both"}), "layout is 'both'; it must be output or input"),
    ],
)
def test_what_a_form_cannot_do(make_base, config, said):
    with pytest.raises(UserError, match=said):
        inject(load_model(make_base()), config)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init_weights": "pissa"}, "no form of MISS with .* init_weights is 'pissa'"),
        ({"init_weights": "mini", "mini_r": None}, "mini_r is None"),
        ({"bias": "some"}, "bias is 'some'; expected none, all or MiSS_only"),
        (
            {"target_parameters": ["blocks.0.att.r_k"]},
            r"target_parameters is \['blocks.0.att.r_k'\], which cannot",
        ),
        ({"use_something": True}, "use_something is True, which cannot be honoured here"),
        ({"layers_to_transform": [0]}, "has an adapter for blocks.1.att.key, which is no target"),
        ({"exclude_modules": "blocks.2.*"}, "has an adapter for blocks.2.att.key, which is no target"),
        ({"layers_to_transform": ["first"]}, r"layers_to_transform is \['first'\]; expected list\[int\]"),
        ({"target_modules": "(("}, r"target_modules: '\(\(' is not a regular expression"),
    ],
)
def test_an_option_of_peft_that_cannot_be_honoured_is_refused_by_name(make_base, tmp_path, changes, said):
    base = make_base()
    save_adapter(inject(load_model(base), AdapterConfig(r=4, target_modules=["att.key"])), tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=said):
        load_adapter(load_model(base), tmp_path / "adapter")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["key", "value"], "modules_to_save": ["ln1", "ffn.value"]},
        {"target_modules": "all-linear", "exclude_modules": ["head"]},
        {"target_modules": ["key"], "layers_to_transform": [0, 2], "layers_pattern": "blocks", "bias": "all"},
        {"target_modules": r".*\.att\.(key|value)", "exclude_modules": r"blocks\.1\..*", "bias": "MiSS_only"},
        {"target_modules": ["key"], "init_weights": False, "layers_pattern": "anything", "inference_mode": True},
        {"target_modules": ["key"], "init_weights": "mini", "mini_r": 8, "miss_dropout": 0.2, "revision": "main"},
        {"target_modules": ["att.output"], "init_weights": "bat", "revision": "main"},
    ],
)
@torch.no_grad()
def test_every_option_of_peft(make_base, tmp_path, options):
    peft = pytest.importorskip("peft")
    base = make_base()
    theirs = peft.get_peft_model(load_model(base), peft.MissConfig(r=8, **options)).eval()
    rng = torch.Generator().manual_seed(5)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=rng)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_adapter(load_model(base), tmp_path / "theirs").eval()
    expected = theirs(TOKENS)[0]
    assert (model(TOKENS)[0] - expected).norm() <= 1e-5 * expected.norm()
    # What is loaded can be saved, and is the same then.
    save_adapter(model, tmp_path / "ours")
    assert torch.equal(load_adapter(load_model(base), tmp_path / "ours").eval()(TOKENS)[0], model(TOKENS)[0])
    if options.get("bias") != "all":
        opened = peft.PeftModel.from_pretrained(load_model(base), tmp_path / "ours").eval()
        assert (opened(TOKENS)[0] - expected).norm() <= 1e-5 * expected.norm()
        # Nothing more is beside a linear there than was trained.
        written = load_file(tmp_path / "ours/adapter_model.safetensors")
        assert peft.get_peft_model_state_dict(opened).keys() == written.keys()


def test_ranks_and_methods_by_pattern(either_base, tmp_path):
    config = AdapterConfig(
        r=8,
        target_modules=["att.key", "att.value", "ffn.key"],
        exclude_modules=["blocks.1.att.value"],
        rank_pattern={r"0\.att\.key": 4, "ffn.key": 16},
        method_pattern={"att.value": "bat", r"blocks\.2\..*": "mini"},
        options={"mini_r": 2},
    )
    model = randomise(inject(load_model(either_base), config))
    F = load_model(either_base).config.dim_ffn
    shapes = {key.removesuffix(".miss_block"): tuple(p.shape) for key, p in trained_parameters(model).items()}
    assert shapes == {
        "blocks.0.att.key": (4, 32),
        "blocks.0.att.value": (4, 8, 8),
        "blocks.0.ffn.key": (16, F),
        "blocks.1.att.key": (8, 32),
        "blocks.1.ffn.key": (16, F),
        "blocks.2.att.key": (8, 2),
        "blocks.2.att.value": (4, 8, 8),
        "blocks.2.ffn.key": (16, 2),
    }
    save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["peft_type"] == "RWKV_MISS"
    again = load_adapter(load_model(either_base), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])
    report = merge(either_base, tmp_path / "adapter", tmp_path / "merged.pth")
    assert {layer.name for layer in report.layers} == shapes.keys() and report.logits_error < 1e-5
    assert load_file(tmp_path / "adapter/adapter_model.safetensors").keys() == {
        f"base_model.model.{path}.miss_block" for path in shapes
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": "att.key"}, "target_modules: att.key matches no linear"),
        ({"exclude_modules": ["att.kye"]}, "exclude_modules: att.kye matches no linear"),
        ({"exclude_modules": "all-linear"}, "excludes every linear"),
        ({"layers_to_transform": 3}, "layers_to_transform: there is no layer 3"),
        (
            {"layers_to_transform": 0, "layers_pattern": "layers"},
            "no layer 0 among .* whose names have layers",
        ),
        ({"layers_pattern": "blocks"}, "layers_pattern is given without layers_to_transform"),
        ({"rank_pattern": {"att.kye": 4}}, "rank_pattern: att.kye matches none of the linears chosen"),
        ({"rank_pattern": {"att.key": 0}}, "rank_pattern gives att.key the rank 0"),
        ({"rank_pattern": {"ffn.value": 97}}, "blocks.0.ffn.value: r is 97 but the linear has only 96 inputs"),
        ({"method_pattern": {"ffn.*": "miis"}}, "method_pattern gives ffn.* the method 'miis'; this version has: miss"),
        ({"method_pattern": {"ffn.*": "state"}}, "method_pattern gives method state, which does not go beside linears"),
        ({"target_modules": "*"}, "target_modules: '\\*' is not a regular expression"),
        ({"layers_to_transform": []}, "layers_to_transform is empty"),
        (
            {"method": "state", "rank_pattern": {"a": 3}},
            "rank_pattern is given, but adapter.method state",
        ),
    ],
)
def test_a_choice_that_means_nothing(tmp_path, random_weights6, options, said):
    torch.save(random_weights6, tmp_path / "base.pth")
    with pytest.raises(UserError, match=said):
        inject(load_model(tmp_path / "base.pth"), AdapterConfig(**{"r": 4, **options}))
