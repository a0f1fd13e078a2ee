"""Members of one batch with adapters of their own: each gets what the model with its adapter gives alone."""

from __future__ import annotations

import pytest
import torch

from rwkv_miss import AdapterConfig, load_adapter, load_model, merge
from rwkv_miss.adapters.stacks import Form
from rwkv_miss.errors import UserError
from rwkv_miss.generation.engine import Engine, Piece
from rwkv_miss.generation.sampling import Sampling
from tests.generation.alone import check, load, save, told
from tests.generation.letters import LETTERS, ids_of, prompt_of

CONFIGS = {
    "miss 4": AdapterConfig(r=4),
    "miss 5": AdapterConfig(r=5),  # divides no linear's inputs
    "miss 4, some linears": AdapterConfig(r=4, target_modules=["att.key", "ffn.value"]),
    "miss 4, one layer": AdapterConfig(r=4, layers_to_transform=[1]),
    "miss 4 and 8": AdapterConfig(r=4, rank_pattern={"ffn[.].*": 8}),
    "mini": AdapterConfig("mini", r=5, options={"mini_r": 8}),
    "lora 4": AdapterConfig("lora", r=4),
    "lora 3": AdapterConfig("lora", r=3, options={"alpha": 5.0, "rank_stabilized": True}),
    "pissa": AdapterConfig("pissa", r=2),
    "miss and lora": AdapterConfig("miss", r=4, method_pattern={"att[.]key": "lora"}),
    "state": AdapterConfig("state"),
    "miss and state": AdapterConfig("miss+state", r=4, target_modules=["att.value"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "max_positions", "tolerance"), [(torch.float64, 24, 2e-6), (torch.float32, None, 2e-4)]
)
def test_each_member_gets_what_its_adapter_gives_alone(either_base, tmp_path, dtype, max_positions, tolerance):
    """Members come and go, and prompts are read whole, and in pieces."""
    folders = {name: save(either_base, tmp_path / name, config, i) for i, (name, config) in enumerate(CONFIGS.items())}
    engine = Engine(load(either_base, dtype), LETTERS, max_positions)
    for name, folder in folders.items():
        engine.adapters.add(name, folder)
    assert engine.adapters.names() == list(folders)
    forms = {name: engine.adapters.find(name).slots.keys() for name in folders}
    assert forms["mini"] == {Form(5, sums_blocks=True)} and forms["pissa"] == {Form(4, sums_blocks=False)}
    assert forms["miss 4 and 8"] == {Form(4, sums_blocks=True), Form(8, sums_blocks=True)}
    names = [None, *folders, "lora 4", None, "miss 4", "miss 4 and 8"]
    prompts = [prompt_of(1 + 13 * i % 40, i) for i in range(len(names))]
    pieces = []
    for i, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        assert engine.add(prompt, Sampling(max_tokens=4 + i % 5, logprobs=20), adapter=name) == i
        if i % 4 == 0:
            pieces += engine.step()
    pieces += engine
    for name in dict.fromkeys(names):
        model = load(either_base, dtype, folders.get(name))
        for i in (i for i, other in enumerate(names) if other == name):
            assert len(ids_of(pieces, i)) == 4 + i % 5
            check(model, prompts[i], pieces, i, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["miss", "lora"])
def test_a_merged_model_in_the_rwkv_package(make_base, tmp_path, rwkv_logits, method):
    base = make_base()
    for seed, name in enumerate(("one", "two")):
        save(base, tmp_path / name, AdapterConfig(method, r=4), seed)
        merge(base, tmp_path / name, tmp_path / f"{name}.pth")
    engine = Engine(load_model(base).eval(), LETTERS)
    names = ["one", "two", None, "one"]
    for name in ("one", "two"):
        engine.adapters.add(name, tmp_path / name)
    for i, name in enumerate(names):
        engine.add(prompt_of(5 + i, i), Sampling(max_tokens=8, logprobs=20), adapter=name)
    pieces = list(engine)
    for i, name in enumerate(names):
        ids, found = ids_of(pieces, i), told(pieces, i)
        logits = rwkv_logits(tmp_path / f"{name}.pth" if name else base, prompt_of(5 + i, i) + ids[:-1])
        log_p = logits[4 + i :].float().log_softmax(-1)
        assert log_p.argmax(-1).tolist() == ids
        assert ((found - log_p).abs().nan_to_num(0) < 2e-4).all()


@pytest.mark.slow
def test_32_adapters_in_one_batch(make_base, tmp_path):
    base = make_base(n_layer=2)
    folders = [save(base, tmp_path / str(i), AdapterConfig(r=4 if i % 8 else 8), i) for i in range(32)]
    engine = Engine(load(base, torch.float64), LETTERS)
    for i in reversed(range(32)):
        engine.adapters.add(str(i), folders[i])
    for i in range(32):
        engine.add(prompt_of(6, 0), Sampling(max_tokens=4, logprobs=20), adapter=str(i))
    pieces = list(engine)
    for i in range(32):
        check(load(base, torch.float64, folders[i]), prompt_of(6, 0), pieces, i, 2e-6)


def test_in_bf16(make_base, tmp_path):
    """As near to float64 as the model with one adapter is."""
    base = make_base()
    configs = {name: CONFIGS[name] for name in ("miss 5", "lora 4")}
    folders = {name: save(base, tmp_path / name, config, 3) for name, config in configs.items()}
    engine = Engine(load(base, torch.bfloat16), LETTERS)
    for i, (name, folder) in enumerate(folders.items()):
        engine.adapters.add(name, folder)
        engine.add(prompt_of(6, i), Sampling(max_tokens=8, logprobs=20), adapter=name)
    pieces = list(engine)
    for i, (name, folder) in enumerate(folders.items()):
        errors = []
        exact = load(base, torch.float64, folder)
        ids = prompt_of(6, i) + ids_of(pieces, i)[:-1]
        for model in (load(base, torch.bfloat16, folder), load(base, torch.bfloat16)):
            with torch.no_grad():
                log_p, expected = (m(torch.tensor([ids]))[0][0, 5:].float().log_softmax(-1) for m in (model, exact))
            asked = told(pieces, i).isfinite()
            errors.append((log_p - expected)[asked].norm())
        alone, without = errors
        assert (told(pieces, i) - expected)[asked].norm() < 1.5 * alone < 0.3 * without, name


def test_adapters_come_and_go_while_members_run(make_base, tmp_path):
    base = make_base()
    folders = {name: save(base, tmp_path / name, AdapterConfig(r=4), ord(name)) for name in "abcd"}
    alone = {name: load(base, torch.float64, folders.get(name)) for name in (None, *folders)}
    engine = Engine(load(base, torch.float64), LETTERS, max_positions=8)
    sampling = Sampling(max_tokens=9, logprobs=20)
    run_with: list[tuple[str | None, list[int]]] = []
    pieces: list[Piece] = []

    def add(name: str | None, folder: str | None) -> None:
        """A member with the adapter `name`, which is that of `folder`."""
        run_with.append((folder, prompt_of(3 + 4 * len(run_with), len(run_with))))
        assert engine.add(run_with[-1][1], sampling, adapter=name) == len(run_with) - 1

    add(None, None)
    pieces += engine.step()
    engine.adapters.add("x", folders["a"])
    add("x", "a")
    pieces += engine.step()
    engine.adapters.add("y", folders["b"])
    add("y", "b")
    add("x", "a")  # its prompt is not read to the end before the adapter is removed
    pieces += engine.step()
    engine.adapters.remove("x")
    assert engine.adapters.names() == ["y"]
    with pytest.raises(UserError, match="there is no adapter whose name is 'x'; there are: y"):
        engine.add([1], adapter="x")
    engine.adapters.add("x", folders["c"])  # another one of that name
    add("x", "c")
    pieces += engine.step()
    engine.adapters.remove("y")
    engine.adapters.add("z", folders["d"])
    add("z", "d")
    for _ in range(12):
        pieces += engine.step()
    add("x", "c")
    engine.cancel(engine.add(prompt_of(90, 7), adapter="z"))
    pieces += engine
    for i, (folder, prompt) in enumerate(run_with):
        assert len(ids_of(pieces, i)) == 9
        check(alone[folder], prompt, pieces, i, 2e-6)

    for name in ("x", "z"):  # all four slots are free again, and are used again
        engine.adapters.remove(name)
    slots = set()
    for name, folder in folders.items():
        engine.adapters.add(name, folder)
        slots |= set(engine.adapters.find(name).slots.values())
    assert slots == {0, 1, 2, 3}


def test_a_slot_keeps_nothing_of_the_adapter_before(make_base, tmp_path):
    """The second adapter has nothing beside most linears."""
    base = make_base()
    whole = save(base, tmp_path / "whole", CONFIGS["miss 4"], 0)
    part = save(base, tmp_path / "part", CONFIGS["miss 4, one layer"], 1)
    engine = Engine(load(base, torch.float64), LETTERS)
    engine.adapters.add("a", whole)
    engine.adapters.remove("a")
    engine.adapters.add("a", part)
    assert list(engine.adapters.find("a").slots.values()) == [0]
    engine.add([1, 2, 3], Sampling(max_tokens=5, logprobs=20), adapter="a")
    check(load(base, torch.float64, part), [1, 2, 3], list(engine), 0, 2e-6)


def test_a_state_that_is_given_stands_for_the_adapters(either_base, tmp_path):
    folder = save(either_base, tmp_path / "a", CONFIGS["miss and state"], 0)
    alone = load(either_base, torch.float64, folder)
    engine = Engine(load(either_base, torch.float64), LETTERS)
    engine.adapters.add("a", folder)
    engine.add(prompt_of(7, 0), Sampling(max_tokens=3), adapter="a", keep_state=True)
    pieces = list(engine)
    engine.add(ids_of(pieces, 0)[-1:], Sampling(max_tokens=5, logprobs=20), adapter="a", state=pieces[-1].state)
    check(alone, prompt_of(7, 0) + ids_of(pieces, 0), list(engine), 1, 2e-6)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (AdapterConfig("dora", r=4), "blocks.0.att.receptance has an adapter of method dora, .*merge it into the base"),
        (AdapterConfig("bat", r=4), "method bat, .*merge it"),
        (AdapterConfig(r=4, method_pattern={"ffn[.]key": "bat"}), "blocks.0.ffn.key has an adapter of method bat"),
        (AdapterConfig(r=4, modules_to_save=["ln_out"]), "has trained ln_out.[a-z]*, a part of the base .*merge it"),
        (AdapterConfig("full"), "has trained .*merge it"),
    ],
)
def test_what_cannot_be_served_beside_others(make_base, tmp_path, config, word):
    base = make_base()
    folder = save(base, tmp_path / "a", config, 0)
    engine = Engine(load(base, torch.float64), LETTERS)
    with pytest.raises(UserError, match=word):
        engine.adapters.add("a", folder)
    assert engine.adapters.names() == []
    engine.adapters.add("a", save(base, tmp_path / "b", CONFIGS["miss 4"], 0))
    assert list(engine.adapters.find("a").slots.values()) == [0]


def test_names_and_bases(make_base, tmp_path):
    base = make_base()
    folder = save(base, tmp_path / "a", CONFIGS["miss 4"], 0)
    engine = Engine(load_model(base), LETTERS)
    with pytest.raises(UserError, match="no adapter whose name is 'a'; there are none"):
        engine.add([1], adapter="a")
    with pytest.raises(UserError, match="no adapter whose name is 'a'"):
        engine.adapters.remove("a")
    engine.adapters.add("a", folder)
    with pytest.raises(UserError, match="an adapter already whose name is 'a'"):
        engine.adapters.add("a", folder)
    with pytest.raises(UserError, match="no such folder"):
        engine.adapters.add("b", tmp_path / "nothing")
    assert engine.adapters.names() == ["a"] and len(engine) == 0
    with pytest.raises(UserError, match="another base"):
        Engine(load_model(make_base("other.pth", seed=1)), LETTERS).adapters.add("a", folder)
    with pytest.raises(UserError, match="the model has an adapter already"):
        Engine(load_adapter(load_model(base), folder), LETTERS).adapters.add("b", folder)
