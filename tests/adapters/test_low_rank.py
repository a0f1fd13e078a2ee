"""LoRA, DoRA and PiSSA: outputs, gradients and files against HF PEFT's, and everything their files cannot say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rwkv_miss import AdapterConfig, TrainConfig, inject, load_adapter, load_model, save_adapter
from rwkv_miss.adapters.inject import held_tensors, installed, trained_parameters
from rwkv_miss.adapters.method import find_methods
from rwkv_miss.errors import UserError
from rwkv_miss.model.linear import Linear
from rwkv_miss.training.optim import parameter_groups

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
METHODS = ("lora", "dora", "pissa")
TOKENS = torch.randint(64, (2, 13), generator=torch.Generator().manual_seed(0))


def layer(method: str, W: Tensor, r: int = 3, dropout: float = 0.0, **options) -> nn.Module:
    """A linear of the weight W with the method beside it, as it starts."""
    linear = Linear(W.shape[1], W.shape[0])
    linear.weight = nn.Parameter(W.clone(), requires_grad=False)
    config = AdapterConfig(method, r=r, dropout=dropout, options={"alpha": 5.0, **options})
    [kind] = find_methods(method)
    module = kind.wrap(linear, config)
    kind.start(module, config)
    return module


def perturbed(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape)
    return module


def pefts(W: Tensor, r: int = 3, dropout: float = 0.0, **fields) -> nn.Module:
    """PEFT's layer for the same."""
    lora = pytest.importorskip("peft.tuners.lora")
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight = nn.Parameter(W.clone(), requires_grad=False)
    config = lora.LoraConfig(r=r, lora_alpha=5, lora_dropout=dropout, **fields)
    return lora.layer.Linear(linear, "default", config=config, r=r, lora_alpha=5)


def copy_to(theirs: nn.Module, mine: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Gives PEFT's layer our values. Returns the pairs of parameters."""
    pairs = [(mine.A, theirs.lora_A["default"].weight), (mine.B, theirs.lora_B["default"].weight)]
    if "lora_magnitude_vector" in dict(mine.named_parameters()):
        pairs.append((mine.lora_magnitude_vector, theirs.lora_magnitude_vector["default"].weight))
    for ours, their in pairs:
        their.data.copy_(ours.data)
    return pairs


def assert_equal(mine: nn.Module, theirs: nn.Module, x: Tensor, pairs: list, tolerance: float = 1e-5) -> None:
    """Outputs and gradients; both drop the same."""
    found = []
    dy = torch.randn(*x.shape[:-1], mine.base_layer.out_features)
    for module, parameters in ((mine, [ours for ours, _ in pairs]), (theirs, [their for _, their in pairs])):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        y = module(leaf)
        found.append([y.detach(), *torch.autograd.grad(y, (leaf, *parameters), dy)])
    for i, (a, b) in enumerate(zip(*found, strict=True)):
        assert (a - b).norm() <= tolerance * b.norm(), i


@pytest.mark.parametrize("shape", [(10, 7), (7, 10)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_outputs_and_gradients_are_pefts(shape, dropout, rank_stabilized, use_dora):
    torch.manual_seed(0)
    W = torch.randn(shape)
    method = "dora" if use_dora else "lora"
    mine = perturbed(layer(method, W, dropout=dropout, rank_stabilized=rank_stabilized))
    theirs = pefts(W, dropout=dropout, use_rslora=rank_stabilized, use_dora=use_dora)
    assert_equal(mine, theirs, torch.randn(2, 5, shape[1]), copy_to(theirs, mine))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16"])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_pissa_is_pefts(start, rank_stabilized):
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 7)).Q for n in (10, 7))
    W = U @ torch.diag(2.0 ** -torch.arange(7)) @ V.T  # the fast SVD finds what stands out
    iterations = 16 if "niter" in start else -1
    mine = layer("pissa", W, rank_stabilized=rank_stabilized, svd_iterations=iterations)
    theirs = pefts(W, init_lora_weights=start, use_rslora=rank_stabilized)
    principal = mine.scale * mine.start_B @ mine.start_A
    torch.testing.assert_close(W - principal, theirs.base_layer.weight, rtol=0, atol=1e-6)
    assert torch.equal(mine.A, mine.start_A) and torch.equal(mine.B, mine.start_B)
    torch.testing.assert_close(mine.A.norm(dim=1), mine.B.norm(dim=0))
    assert torch.equal(mine.base_layer.weight, W)
    assert_equal(perturbed(mine), theirs, torch.randn(2, 5, 7), copy_to(theirs, mine))


@pytest.mark.parametrize("method", METHODS)
def test_in_bf16_beside_float64(method):
    torch.manual_seed(0)
    W, x = torch.randn(24, 16, dtype=torch.bfloat16), torch.randn(9, 16, dtype=torch.bfloat16)
    narrow = perturbed(layer(method, W))
    wide = layer(method, W.double())
    wide.load_state_dict(narrow.state_dict())
    assert {p.dtype for p in trained_parameters(narrow).values()} == {torch.float32}
    assert {p.dtype for p in trained_parameters(wide).values()} == {torch.float64}
    results = []
    for module, rows in ((narrow, x), (wide, x.double())):
        y = module(rows)
        gradients = torch.autograd.grad(y.sum(), list(trained_parameters(module).values()))
        results.append([t.double() for t in (y, *gradients)])
    for found, exact in zip(*results, strict=True):
        assert (found - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize(
    ("method", "numbers"),
    [("lora", 77 * (64 + 6)), ("dora", 77 * (64 + 6 + 40)), ("pissa", 77 * (64 + 12) + 12 * (64 + 40))],
)
def test_what_is_kept_for_the_backward_pass(method, numbers):
    """x and A x, with DoRA the output; and nothing else that grows with x."""
    module = layer(method, torch.randn(40, 64), r=6)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        module(torch.randn(7, 11, 64, requires_grad=True))
    found = sum(n for at, n in kept.items() if at not in {t.data_ptr() for t in module.state_dict().values()})
    lengths = 3 * 40 if method == "dora" else 0
    assert 0 <= found - numbers <= lengths


@torch.no_grad()
def test_a_small_change_of_a_length_is_not_lost_in_bf16():
    """m / n of 1.003 is 1 in bf16. The outputs are rounded too, but up and down."""
    module = layer("dora", torch.ones(1, 1, dtype=torch.bfloat16), r=1)
    module.lora_magnitude_vector.data *= 1.003
    x = torch.randn(99999, 1).to(torch.bfloat16)
    assert (module(x).double().abs().mean() / x.double().abs().mean()).item() == pytest.approx(1.003, abs=3e-4)


def test_a_row_of_zeros_stays_one():
    W = torch.randn(4, 5)
    W[2] = 0
    module = layer("dora", W)
    for B in (torch.zeros(4, 3), torch.randn(4, 3)):
        module.B.data.copy_(B)
        y = module(torch.randn(3, 5))
        y.sum().backward()
        assert torch.isfinite(y).all() and all(
            torch.isfinite(p.grad).all() for p in trained_parameters(module).values()
        )
        assert torch.equal(y[:, 2], torch.zeros(3))


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_new_one_computes_the_base(either_base, method):
    expected = load_model(either_base)(TOKENS)[0]
    found = inject(load_model(either_base), AdapterConfig(method, r=5))(TOKENS)[0]
    if method == "pissa":
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    else:
        assert torch.equal(found, expected)


def test_a_starts_as_pefts():
    torch.manual_seed(3)
    A = layer("lora", torch.randn(10, 7)).A
    torch.manual_seed(3)
    torch.randn(10, 7)
    Linear(7, 10)
    assert torch.equal(A, nn.Linear(7, 3, bias=False).weight)


@pytest.mark.parametrize("method", METHODS)
def test_only_inject_draws(make_base, tmp_path, method):
    """The values that a run starts from depend on the seed alone; what is read from a file draws nothing."""
    base, config = make_base(), AdapterConfig(method, r=4)
    starts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = inject(load_model(base), config)
        starts.append(torch.cat([t.detach().flatten() for t in held_tensors(model).values()]))
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    save_adapter(model, tmp_path / "adapter")
    before = torch.get_rng_state()
    load_adapter(load_model(base), tmp_path / "adapter")
    with torch.device("meta"):
        inject(type(model)(model.config), config)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_goes_on_as_it_was(either_base, tmp_path, method):
    torch.manual_seed(0)
    config = AdapterConfig(method, r=4, rank_pattern={"ffn[.].*": 6}, options={"alpha": 9.0, "rank_stabilized": True})
    model = perturbed(inject(load_model(either_base), config)).eval()
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load_model(either_base), tmp_path / "adapter").eval()
    assert held_tensors(again).keys() == held_tensors(model).keys()
    assert all(torch.equal(tensor, held_tensors(again)[key]) for key, tensor in held_tensors(model).items())
    found = installed(again).config
    assert (found.method, found.r, found.rank_pattern) == (method, 4, {"ffn[.].*": 6})
    assert found.options["alpha"] == pytest.approx(9.0) and found.options["rank_stabilized"]
    with torch.no_grad():
        assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])
        peft = pytest.importorskip("peft")
        theirs = peft.PeftModel.from_pretrained(load_model(either_base), tmp_path / "adapter")
        expected = model(TOKENS)[0]
        assert (theirs(TOKENS)[0] - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_pefts_pissa_is_read_once_it_is_for_the_base(either_base, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["key", "value"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(load_model(either_base), config)
    theirs.peft_config["default"].init_lora_weights = True  # so that the values it starts from can be loaded
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    perturbed(theirs)
    expected = theirs.eval()(TOKENS)[0]
    theirs.save_pretrained(tmp_path / "as_it_is")
    with pytest.raises(UserError, match=r"init_lora_weights is 'pissa', .* path_initial_model_for_weight_conversion"):
        load_adapter(load_model(either_base), tmp_path / "as_it_is")
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start")
    found = load_adapter(load_model(either_base), tmp_path / "converted").eval()
    torch.testing.assert_close(found(TOKENS)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_groups_of_lora_plus_are_pefts(make_base, tmp_path, method):
    peft = pytest.importorskip("peft")
    optimizers = pytest.importorskip("peft.optimizers")
    config = AdapterConfig(method, r=4, options={"lr_ratio": 16.0})
    model = inject(load_model(make_base()), config)
    groups = parameter_groups(model, TrainConfig(base="", data="", tokenizer="", out="", lr=1e-3, adapter=config))
    found = {key: group.lr for group, parameters in groups.items() for key in parameters}
    assert {group.name for group in groups} == {"", "lora_B"}
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(load_model(make_base()), tmp_path / "adapter", is_trainable=True)
    optimizer = optimizers.create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): rates[id(p)]
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert found == {key.replace("magnitude_vector.weight", "magnitude_vector"): lr for key, lr in expected.items()}


@pytest.fixture
def folder(make_base, tmp_path) -> Path:
    save_adapter(inject(load_model(make_base()), AdapterConfig("lora", r=4)), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": -1}, "lora_alpha is -1; expected a number above 0"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_dropout": 1}, r"lora_dropout is 1; expected a number in \[0, 1\)"),
        ({"use_rslora": 1}, "use_rslora is 1; expected true or false"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16', with which PEFT changes"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"bias": "all"}, "bias is 'all', which cannot be honoured"),
        ({"lora_bias": True}, "lora_bias is True, which cannot be honoured"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True, which cannot be honoured"),
        ({"alpha_pattern": {"att.key": 4}}, "alpha_pattern is .*, which cannot be honoured"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"something_new": True}, "something_new is True, which cannot be honoured"),
        ({"use_dora": True}, "lora_magnitude_vector"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(make_base, folder, changes, said):
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(content | changes))
    with pytest.raises(UserError, match=said):
        load_adapter(load_model(make_base()), folder)


def test_what_peft_writes_beside_it_is_read(make_base, tmp_path):
    peft = pytest.importorskip("peft")
    for use_dora in (False, True):
        config = peft.LoraConfig(r=4, target_modules=["att.key"], init_lora_weights="gaussian", use_dora=use_dora)
        peft.get_peft_model(load_model(make_base()), config).save_pretrained(tmp_path / "adapter")
        model = load_adapter(load_model(make_base()), tmp_path / "adapter")
        assert installed(model).config.method == ("dora" if use_dora else "lora")
        assert installed(model).config.options == {"alpha": 8.0, "rank_stabilized": False}
        assert set(load_file(tmp_path / "adapter" / WEIGHTS)) == {
            f"base_model.model.{key}" for key in trained_parameters(model)
        }


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (AdapterConfig("lora", options={"alpha": 0.0}), "adapter.options.alpha is 0.0; it must be a number above 0"),
        (AdapterConfig("dora", options={"lr_ratio": -1.0}), "adapter.options.lr_ratio is -1.0"),
        (AdapterConfig("pissa", r=33), "att.receptance: r is 33 but the linear is 32 -> 32; lower adapter.r"),
        (AdapterConfig("pissa", r=4, options={"svd_iterations": -2}), "svd_iterations is below -1"),
        (AdapterConfig("pissa", r=4, dropout=0.1), "adapter.dropout is given, but adapter.method pissa has no use"),
    ],
)
def test_settings_that_they_cannot_have(make_base, config, said):
    with pytest.raises(UserError, match=said):
        inject(load_model(make_base()), config)
