"""A logger is one line of a table: the toy gets the same figures as metrics.csv."""

from __future__ import annotations

from dataclasses import replace

import pytest
from lightning.fabric.loggers.logger import Logger

from rwkv_miss.errors import UserError
from rwkv_miss.training.loggers import LOGGERS
from tests.training.runs import losses, quiet_train, small_config


class InMemory(Logger):
    name, version = "memory", ""

    def __init__(self, columns, step):
        self.columns, self.step, self.rows, self.status = columns, step, [], None

    def log_metrics(self, metrics, step=None):
        self.rows.append({"step": step, **metrics})

    def log_hyperparams(self, params, *args, **kwargs):
        raise NotImplementedError

    def finalize(self, status):
        self.status = status


@pytest.fixture
def made(monkeypatch) -> list[InMemory]:
    loggers = []
    monkeypatch.setitem(
        LOGGERS, "memory", lambda out, columns, step: loggers.append(InMemory(columns, step)) or loggers[-1]
    )
    return loggers


def test_it_is_given_every_figure(base, data, tmp_path, made):
    config = replace(small_config(base, data, tmp_path / "run"), loggers=["memory", "csv"], val_split=0.2, val_every=2)
    quiet_train(replace(config, max_steps=4))
    [logger] = made
    assert logger.status == "success" and logger.step == 0
    assert [row["loss"] for row in logger.rows if "loss" in row] == pytest.approx(losses(config.out), rel=1e-5)
    assert [row["val_loss"] for row in logger.rows if "val_loss" in row] == pytest.approx(
        losses(config.out, "val_loss"), rel=1e-5
    )
    assert all(set(row) <= {"step", *logger.columns} for row in logger.rows)
    assert (tmp_path / "run" / "tensorboard").exists()  # it is there always, and so is metrics.csv
    quiet_train(replace(config, max_steps=6, resume="auto"))
    assert made[1].step == 4


def test_one_that_is_not_there(base, data, tmp_path):
    config = replace(small_config(base, data, tmp_path / "run"), loggers=["csv", "mlflow"])
    with pytest.raises(UserError, match="loggers has 'mlflow'; there are csv, tensorboard"):
        quiet_train(config)
