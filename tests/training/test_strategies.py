"""However many processes share the work, and in whatever way, the run is that of one process."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from rwkv_miss.config import AdapterConfig
from rwkv_miss.errors import UserError
from tests.training.runs import adapter, losses, quiet_train, run_train, small_config

METHODS = {"miss": AdapterConfig(r=4), "full": AdapterConfig("full")}
# (strategy, processes, RWKV version, method, offload). Each strategy with 2 and 4 processes, every pair of a strategy
# with a version and with a method.
CASES = [
    ("ddp", 4, 7, "miss", "none"),
    ("ddp", 2, 6, "full", "none"),
    ("deepspeed_stage_1", 2, 7, "full", "none"),
    ("deepspeed_stage_1", 4, 6, "miss", "none"),
    ("deepspeed_stage_2", 4, 7, "full", "none"),
    ("deepspeed_stage_2", 2, 6, "miss", "optimizer"),
    ("deepspeed_stage_3", 4, 6, "full", "none"),
    ("deepspeed_stage_3", 2, 7, "miss", "none"),
    ("deepspeed_stage_3", 2, 7, "full", "all"),
]


@pytest.fixture(scope="module")
def one(any_base, data, tmp_path_factory):
    """`one(method)`: the settings and the result of 20 steps of 8 rows in one process."""
    made = {}

    def run(method: str):
        if method not in made:
            config = replace(
                small_config(any_base, data, tmp_path_factory.mktemp(method)),
                adapter=METHODS[method],
                max_steps=20,
                lr=1e-3,
                gradient_checkpointing=True,
                packing=True,
            )
            quiet_train(config)
            made[method] = config
        return made[method]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("any_base", [6, 7], indirect=True, ids=["RWKV-6", "RWKV-7"])
@pytest.mark.parametrize("strategy, devices, version, method, offload", CASES)
def test_the_run_is_that_of_one_process(any_base, one, tmp_path, strategy, devices, version, method, offload):
    if f"rwkv{version}" not in any_base.name:
        pytest.skip("the other version")
    expected = one(method)
    config = replace(expected, out=str(tmp_path), strategy=strategy, devices=devices, offload=offload)
    done = run_train(replace(config, batch_size=4 // devices, accumulate=2))
    assert done.returncode == 0, done.stderr
    assert losses(config.out) == pytest.approx(losses(expected.out), rel=1e-5) and len(losses(config.out)) == 20
    for name, tensor in adapter(expected.out).items():
        torch.testing.assert_close(adapter(config.out)[name], tensor, rtol=2e-3, atol=5e-5)


JSON = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW"},
    "scheduler": {"type": "WarmupLR"},
    "fp16": {"enabled": True},
    "bf16": {"enabled": False},
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "nvme"}},
}


@pytest.mark.parametrize(
    "name, said",
    [
        ("train_batch_size", "train_batch_size is 8, which batch_size, accumulate and devices of rwkv-miss decide"),
        ("train_micro_batch_size_per_gpu", "which batch_size of rwkv-miss decides"),
        ("gradient_accumulation_steps", "is 1, which accumulate of"),
        ("gradient_clipping", "is 1.0, which grad_clip of"),
        ("optimizer", 'optimizer.type is "AdamW", which lr, betas and weight_decay of'),
        ("scheduler", "which schedule, warmup_steps and lr_min of"),
        ("fp16", "fp16.enabled is true, which precision of"),
        ("bf16", "bf16.enabled is false, which precision of"),
        ("zero_optimization", r"zero_optimization\.stage is 3, which strategy of"),
    ],
)
def test_what_conflicts_in_a_deepspeed_json_is_an_error(make_config, tmp_path, name, said):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({name: JSON[name]}))
    with pytest.raises(UserError, match=rf"ds\.json: .*{said}.*; remove it there, or make it \"auto\""):
        quiet_train(make_config(strategy="deepspeed_stage_2", deepspeed_config=str(path)))


@pytest.mark.parametrize("content", ["", "[1]", "{", "\x00", "[" * 100_000])
def test_a_deepspeed_json_that_is_none(make_config, tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"ds\.json: (not a JSON file|holds a list; expected)"):
        quiet_train(make_config(strategy="deepspeed_stage_2", deepspeed_config=str(path)))


@pytest.mark.slow
def test_a_deepspeed_json_is_used(make_config, tmp_path):
    path = tmp_path / "ds.json"
    auto = {name: "auto" for name in JSON if name != "zero_optimization"}
    zero = {"stage": "auto", "stage3_param_persistence_threshold": "few", "offload_param": {"device": "auto"}}
    path.write_text(json.dumps(auto | {"zero_optimization": zero}))
    config = make_config(strategy="deepspeed_stage_3", deepspeed_config=str(path), max_steps=1)
    done = run_train(config)
    assert done.returncode == 2, done.stderr
    assert "deepspeed_config: DeepSpeed refuses stage3_param_persistence_threshold = 'few'" in done.stderr
    path.write_text(path.read_text().replace('"few"', "7"))
    done = run_train(config)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"precision": "fp16"}, "precision is fp16, whose values end at 65,504"),
        ({"precision": "fp8"}, "precision is 'fp8'; it must be auto, bf16 or fp32"),
        ({"offload": "optimizer"}, "offload is given, but strategy is auto; give one of DeepSpeed's"),
        ({"deepspeed_config": "x"}, "deepspeed_config is given, but strategy is auto"),
        ({"offload": "all", "strategy": "deepspeed_stage_2"}, "offload is all, but .*; give deepspeed_stage_3"),
    ],
)
def test_what_does_not_combine(make_config, changes, said):
    with pytest.raises(UserError, match=said):
        quiet_train(make_config(**changes))
