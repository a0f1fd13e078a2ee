"""The whole model, against implementations that are not ours and against itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rwkv_miss import load_model
from rwkv_miss.errors import UserError
from rwkv_miss.model.rwkv7 import RWKV7


def ids(n_tokens: int, vocab_size: int, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, (batch, n_tokens), generator=torch.Generator().manual_seed(seed))


def loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Sum over the batch, so that the losses of pieces add up."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten(), reduction="sum")


def gradients(model: RWKV7, value: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(value, parameters), strict=True))


def assert_close(mine: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    """Relative error in norm of every gradient."""
    assert mine.keys() == other.keys()
    for name, x in mine.items():
        norm = other[name].double().norm()
        assert norm > 0, f"{name}: a gradient of zeros shows nothing"
        error = (x.double() - other[name].double()).norm() / norm
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def test_published_logits(tiny_model):
    published = np.fromfile(tiny_model.with_suffix(".logits.f32"), dtype="<f4")
    logits, _ = load_model(tiny_model)(torch.tensor([list(b'"in')]))
    assert logits.shape == (1, 3, 256)
    assert np.abs(logits[0, -1].detach().numpy() - published).max() < 1e-5


def test_the_rwkv_package_on_a_trained_model(tiny_model, rwkv_logits):
    tokens = ids(257, 256)
    logits, _ = load_model(tiny_model)(tokens)
    assert (logits[0] - rwkv_logits(tiny_model, tokens[0].tolist())).abs().max() < 5e-5


@pytest.mark.parametrize("sizes", [{"head_size": 8}, {"head_size": 32}, {"n_embd": 64, "layer0_v": True}])
def test_the_rwkv_package_on_random_weights(make_base, rwkv_logits, sizes):
    path, tokens = make_base(**sizes), ids(37, 64)
    logits, _ = load_model(path)(tokens)
    expected = rwkv_logits(path, tokens[0].tolist())
    assert (logits[0] - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("sizes", [{"n_embd": 128, "head_size": 64}, {"head_size": 16}])
def test_gradients_of_rwkv7_hf(make_base, random_weights, sizes):
    """d loss / d every weight, against an implementation in plain PyTorch (a loop over the tokens)."""
    converter = pytest.importorskip("rwkv7_hf.converter")
    weights = random_weights(**sizes)
    hf = converter.RWKV7ForCausalLM(converter.infer_config(weights, "float32", "reference", False))
    for layer in hf.model.layers:
        # Theirs is 1e-5 times the head size, which is right for 64 alone: BlinkDL's is 64e-5 whatever the head size.
        layer.attn.g_norm.eps = 64e-5
    theirs = dict(hf.named_parameters())
    where = {name: converter.translate_name(name, 3) for name in weights}
    for name, (hf_name, transposed) in where.items():
        value = weights[name].T if transposed else weights[name]
        theirs[hf_name].data.copy_(value.reshape(theirs[hf_name].shape))
    assert len(where) == len(theirs), "a weight of theirs was left as it was initialised"

    tokens = ids(33, 63, batch=2) + 1  # theirs takes token 0 for padding, whose embedding gets no gradient
    expected = hf(tokens).logits
    expected_loss = loss(expected, tokens)
    expected_loss.backward()
    model = load_model(make_base(**sizes))
    logits, _ = model(tokens)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    mapped = {
        name: (theirs[n].grad.T if transposed else theirs[n].grad).reshape(weights[name].shape)
        for name, (n, transposed) in where.items()
    }
    assert_close(gradients(model, loss(logits, tokens)), mapped, 3e-5)


@pytest.mark.parametrize("pieces", [(1, 36), (7, 13, 17), (16, 16, 5), (36, 1)])
def test_pieces_with_the_state_carried_on_are_one_pass(make_base, pieces):
    model, tokens = load_model(make_base(), dtype=torch.float64), ids(37, 64, batch=2)
    whole, last = model(tokens)
    state, logits = None, []
    for piece in tokens.split(pieces, dim=1):
        out, state = model(piece, state)
        logits.append(out)
    joined = torch.cat(logits, 1)
    assert (joined - whole).abs().max() < 1e-11
    for name in ("att_shift", "wkv", "ffn_shift"):
        assert (getattr(state, name) - getattr(last, name)).abs().max() < 1e-11
    assert_close(gradients(model, loss(joined, tokens)), gradients(model, loss(whole, tokens)), 1e-9)


def test_a_model_does_not_change_the_state_it_is_given(make_base):
    model, tokens = load_model(make_base()), ids(9, 64)
    _, state = model(tokens)
    before = [x.clone() for x in (state.att_shift, state.wkv, state.ffn_shift)]
    first, _ = model(tokens, state)
    again, _ = model(tokens, state)
    assert torch.equal(first, again)
    assert all(map(torch.equal, before, (state.att_shift, state.wkv, state.ffn_shift)))


@pytest.mark.parametrize("carried", [False, True])
def test_seq_start_makes_separate_documents(make_base, carried):
    """Row 0 holds documents of 5, 1, 17 and 14 tokens, row 1 of 20 and 17; a carried state belongs to the first."""
    model, tokens = load_model(make_base(), dtype=torch.float64), ids(37, 64, batch=2)
    starts = ([0, 5, 6, 23], [0, 20])
    seq_start = torch.zeros(2, 37, dtype=torch.bool)
    for row, places in enumerate(starts):
        seq_start[row, places[1:]] = True
    with torch.no_grad():
        state = model(ids(4, 64, batch=2, seed=2))[1] if carried else None
    packed, _ = model(tokens, state, seq_start)
    separate, total = [], 0.0
    for row, places in enumerate(starts):
        for start, end in zip(places, [*places[1:], 37], strict=True):
            first = state is not None and start == 0
            own = state.map(lambda x, row=row: x[:, row : row + 1]) if first else None
            logits, _ = model(tokens[row : row + 1, start:end], own)
            separate.append((row, start, end, logits))
            total = total + loss(logits, tokens[row : row + 1, start:end])
    packed_total = 0.0
    for row, start, end, logits in separate:
        part = packed[row : row + 1, start:end]
        assert (part - logits).abs().max() < 1e-11
        packed_total = packed_total + loss(part, tokens[row : row + 1, start:end])
    assert_close(gradients(model, packed_total), gradients(model, total), 1e-9)


def test_gradient_checkpointing_changes_no_gradient(make_base):
    model, tokens = load_model(make_base()), ids(21, 64, batch=2)
    seq_start = torch.zeros(2, 21, dtype=torch.bool)
    seq_start[1, 8] = True
    saved = []
    expected = gradients(model, loss(model(tokens, seq_start=seq_start)[0], tokens))
    for on in (False, True):
        model.gradient_checkpointing = on
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            logits, _ = model(tokens, seq_start=seq_start)
        saved.append(sum(sizes))
        mine = gradients(model, loss(logits, tokens))
        assert all(torch.equal(mine[name], expected[name]) for name in expected)
    assert saved[1] < saved[0] / 3


@pytest.mark.parametrize("layer0_v", [False, True])
def test_layer_0_v_is_not_used(make_base, layer0_v):
    path, tokens = make_base(layer0_v=True), ids(9, 64)
    expected, _ = load_model(path)(tokens)
    weights = torch.load(path)
    for part in ("v0", "v1", "v2"):
        if layer0_v:
            weights[f"blocks.0.att.{part}"].fill_(float("nan"))
        else:
            del weights[f"blocks.0.att.{part}"]
    torch.save(weights, path)
    model = load_model(path)
    assert torch.equal(model(tokens)[0], expected)
    assert not any(name.startswith("blocks.0.att.v0") for name, _ in model.named_parameters())
    assert model.config.low_rank == {"w": 5, "a": 6, "v": 3, "g": 9}


def test_one_layer(make_base, rwkv_logits):
    path, tokens = make_base(n_layer=1), ids(9, 64)
    model = load_model(path)
    assert "v" not in model.config.low_rank
    logits, state = model(tokens)
    assert (logits[0] - rwkv_logits(path, tokens[0].tolist())).abs().max() < 1e-4
    assert state.wkv.shape == (1, 1, 2, 16, 16)
    assert all(torch.isfinite(g).all() for g in gradients(model, loss(logits, tokens)).values())


def test_config_and_dtypes(make_base):
    path = make_base(dtype=torch.bfloat16)
    model = load_model(path)
    config = model.config
    assert (config.version, config.n_layer, config.n_embd, config.n_head) == (7, 3, 32, 2)
    assert (config.head_size, config.dim_ffn, config.vocab_size) == (16, 128, 64)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_model(path, "fp32").parameters()} == {torch.float32}
    half = make_base("half.pth", dtype=torch.float16)
    assert {p.dtype for p in load_model(half).parameters()} == {torch.float32}
    with pytest.raises(UserError, match="fp16"):
        load_model(path, "fp16")
    with pytest.raises(UserError, match="'int8'"):
        load_model(path, "int8")


def test_bf16_is_near_fp32(make_base):
    path, tokens = make_base(dtype=torch.bfloat16), ids(65, 64, batch=2)
    exact = load_model(path, "fp32")
    model = load_model(path)
    logits, state = model(tokens)
    assert (logits.dtype, state.wkv.dtype, state.att_shift.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    expected, _ = exact(tokens)
    assert (logits - expected).norm() / expected.norm() < 0.05
    mine, other = gradients(model, loss(logits, tokens)), gradients(exact, loss(expected, tokens))
    assert_close(mine, other, 0.2)


def test_reading_a_safetensors_file_makes_the_same_model(make_base):
    tokens = ids(9, 64)
    a, b = load_model(make_base()), load_model(make_base("base.st"))
    assert torch.equal(a(tokens)[0], b(tokens)[0])
    assert a.fingerprint == b.fingerprint


@pytest.mark.parametrize("shape", [(3,), (1, 0), (1, 1, 1)])
def test_tokens_of_the_wrong_shape(make_base, shape):
    with pytest.raises(ValueError, match="T >= 1"):
        load_model(make_base())(torch.zeros(shape, dtype=torch.int64))


def test_keys_are_the_reference_models(tiny_model, random_weights):
    """The random checkpoints that the other tests use have the keys and numbers of dimensions of a real one."""
    real = torch.load(tiny_model, mmap=True)
    made = random_weights(n_layer=12, n_embd=64, head_size=64, vocab_size=256)
    assert {k: t.ndim for k, t in real.items()} == {k: t.ndim for k, t in made.items()}
