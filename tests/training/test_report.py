"""report.html: what it shows of a run, that it needs nothing else, and that a browser has nothing to complain of."""

from __future__ import annotations

import json
import re
import shutil
import signal
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from rwkv_miss import __version__
from rwkv_miss.cli import main
from rwkv_miss.config import TrainConfig
from rwkv_miss.errors import Stopped
from rwkv_miss.training.charts import Line, _labels, _ticks, chart
from rwkv_miss.training.checks import as_yaml
from rwkv_miss.training.report import write_report
from rwkv_miss.training.saving import Saver
from tests.processes import run_process
from tests.training.runs import losses, quiet_train

NASTY = "<script>alert('x')</script> & \"quoted\" \x1b[31m </pre>"
VOID = {"meta", "link"}


class Page(HTMLParser):
    """The elements of a page and its text. Every element has to be closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def charts(self) -> list[str]:
        return [attributes["aria-label"] for tag, attributes in self.tags if tag == "svg"]


def assert_self_contained(page: Page) -> None:
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert all(attributes.get(name, "data:,") == "data:," for name in ("src", "href", "srcset", "action")), tag


@pytest.fixture
def folder(tmp_path) -> Path:
    """What a run of 2,000 steps leaves, with text in it that a page must not take for its own."""
    out = tmp_path / NASTY.replace("/", "")
    out.mkdir()
    settings = as_yaml(TrainConfig(base="b.pth", data=NASTY, tokenizer="bytes", out=str(out), lr=3e-4, log_every=1))
    (out / "config.yaml").write_text(yaml.safe_dump(settings))
    lines = [
        "step,epoch,tokens,positions,loss,val_loss,lr,lr_state,grad_norm,tokens_per_s,positions_per_s,memory_mb,seconds"
    ]
    lines.append("0,0,0,0,,2.5,,,,,,,0.1")
    for step in range(1, 2001):
        norm = "nan" if step == 7 else "inf" if step == 8 else 1 + step % 3
        lines.append(
            f"{step},0,{step * 90},{step * 99},{2 + 1 / step:.4f},,0.0003,0.5,{norm},900,990,512.5,{step % 1000}"
        )
    lines.append("2000,0,180000,198000,,1.25,,,,,,,999")
    (out / "metrics.csv").write_text("\n".join(lines) + "\n")
    rows = [{"step": s, "prompt": NASTY, "expected": " yes", "answer": " yes" if s == 9 else NASTY} for s in range(10)]
    (out / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = {
        "total_steps": 3000,
        "trained": [NASTY],
        "command": NASTY,
        "ended": "now",
        "error": NASTY,
        "machine": {"CPU": NASTY},
    }
    (out / "run.json").write_text(json.dumps(facts))
    return out


def test_what_it_shows(folder):
    page = Page(write_report(folder))
    assert_self_contained(page)
    rates = ["Learning rate", "Learning rate, state"]
    assert page.charts() == ["Loss", *rates, "Gradient norm, before clipping", "Tokens per second", "Peak memory, MB"]
    visible = NASTY.replace("\x1b", "\ufffd")
    # In the facts, in the settings, once as a prompt, and nine times as an answer.
    assert page.text.count(visible) == 4 + 1 + 1 + 9
    assert f"2,000 of 3,000 steps: {visible}" in page.text
    assert "3.0000 → 2.0005" in page.text and "2.5000 → 1.2500" in page.text and "best, at step 2,000" in page.text
    assert "180,000 tokens" in page.text and "900 tokens/s" in page.text and "0.51 GB" in page.text
    assert "0:49:57" in page.text  # 999 s twice before a process was replaced by the next, then 999 s
    assert "6 more" in page.text  # answers between the first and the newest three
    assert (folder / "report.html").stat().st_size < 200_000


def test_a_run_writes_it(make_config):
    config = make_config(max_steps=3, val_split=0.2, sample_every=2)
    quiet_train(config)
    out = Path(config.out)
    page = Page(out / "report.html")
    assert_self_contained(page)
    assert len(page.charts()) == 5 and "3 of 3 steps done" in page.text
    assert f"{losses(out)[-1]:.4f}" in page.text and "count " in page.text
    dots = [attributes for tag, attributes in page.tags if tag == "path" and "dot" in attributes["class"]]
    assert len(dots) == 3 + 2 + 3 + 3 + 2 * 3 + 3  # losses, validations, rates, norms, speeds, memory
    facts = json.loads((out / "run.json").read_text())
    assert facts["machine"]["rwkv_miss"] == __version__ and facts["machine"]["torch"] and facts["machine"]["memory"]
    assert (facts["from_step"], facts["total_steps"], facts["processes"], facts["error"]) == (0, 3, 1, None)
    quiet_train(replace(config, max_steps=4, resume="auto"))
    page = Page(out / "report.html")
    assert "4 of 4 steps done" in page.text and "step 3" in page.text
    assert json.loads((out / "run.json").read_text())["from_step"] == 3


def test_a_run_that_is_stopped_or_fails_writes_it_too(make_config, monkeypatch):
    config = make_config(max_steps=3)
    save = Saver._save

    def stop(self, trainer):
        save(self, trainer)
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(Saver, "_save", stop)
    with pytest.raises(Stopped):
        quiet_train(replace(config, save_every=2))
    assert "2 of 3 steps; stopped by SIGTERM, after a checkpoint" in Page(Path(config.out) / "report.html").text


def test_the_command_makes_it_of_an_older_run(make_config, capsys, tmp_path):
    """From before there were run.json, samples and gradient norms."""
    config = make_config(max_steps=1)
    quiet_train(config)
    out = Path(config.out)
    for name in ("run.json", "report.html"):
        (out / name).unlink()
    (out / "metrics.csv").write_text("step,tokens,loss,val_loss,lr,tokens_per_s,seconds\n1,9,5.5,,0.1,900,0.5\n")
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"
    page = Page(out / "report.html")
    assert page.charts() == ["Loss", "Learning rate", "Tokens per second"] and "1 steps; the run goes on" in page.text
    (out / "run.json").write_text("[")
    assert main(["report", str(out)]) == 2
    assert "run.json: not the facts of a run" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run (there is no config.yaml)" in capsys.readouterr().err


def test_a_run_without_a_figure_yet(make_config):
    config = make_config(max_steps=1)
    quiet_train(config)
    (Path(config.out) / "metrics.csv").unlink()
    assert Page(write_report(Path(config.out))).charts() == []


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 0.01, ["0", "0.002", "0.004", "0.006", "0.008", "0.010"]),
        (0, 2e-5, ["0", "5e-6", "1e-5", "1.5e-5", "2e-5"]),
        (1.08, 2.99, ["1.0", "1.5", "2.0", "2.5", "3.0"]),
        (0, 41000, ["0", "10,000", "20,000", "30,000", "40,000", "50,000"]),
        (3, 3, ["1", "2", "3", "4", "5"]),
        (0, 0, ["-0.6", "-0.4", "-0.2", "0", "0.2", "0.4", "0.6"]),
        (-5, 1e9, ["-2e8", "0", "2e8", "4e8", "6e8", "8e8", "1e9"]),
    ],
)
def test_the_numbers_of_an_axis(low, high, labels):
    assert _labels(_ticks(low, high)) == labels


def test_a_chart_of_one_step_and_of_none():
    assert chart("x", [Line("a", [(5, 1.0)])]).count("<circle") == 0
    assert "step 5: 1" in chart("x", [Line("a", [(5, 1.0)])])
    assert chart("x", [Line("a", []), Line("b", [(1, float("nan"))])]) == ""


def test_a_loss_that_falls_far_is_drawn_on_a_logarithmic_axis():
    drawn = chart("Loss", [Line("a", [(1, 7.5), (10, 0.1), (20, 0.003)])], from_zero=False)
    assert "Loss, logarithmic" in drawn and re.findall(r"%\">([\d.]+)</span>", drawn) == [
        "0.001",
        "0.01",
        "0.1",
        "1",
        "10",
    ]
    [line] = re.findall(r'class="line s0" d="M([^"]*)"', drawn)
    assert float(line.split("L")[1].split()[1]) == 500  # 0.1 is in the middle of 0.001 to 10
    assert "logarithmic" not in chart("Loss", [Line("a", [(1, 7.5), (10, 0.0)])], from_zero=False)


def test_every_point_of_a_long_line_is_within_its_band():
    drawn = chart("x", [Line("a", [(i, 100.0 if i == 7777 else 1.0) for i in range(20_000)])])
    [band] = re.findall(r'class="band s0" d="M([^"]*)Z"', drawn)
    heights = [float(point.split()[1]) for point in band.split("L")]
    assert min(heights) == 0 and max(heights) == 990  # 100 and 1 of 0 to 100


@pytest.mark.slow
def test_a_browser_has_nothing_to_complain_of(folder, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("there is no Chromium on this machine")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom"]
    page = write_report(folder)
    done = run_process([*command, "--window-size=1280,900", page.as_uri()], 60)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    assert done.stdout.count("<svg") == 6 and "<script" not in done.stdout
    # On a phone nothing is wider than the screen.
    phone = tmp_path / "phone.html"
    frame = f'<iframe srcdoc="{escape(page.read_text())}" style="width: 360px; height: 640px; border: 0"></iframe>'
    width = "document.querySelector('iframe').contentDocument.documentElement.scrollWidth"
    phone.write_text(f"{frame}<script>onload = () => document.title = {width}</script>")
    done = run_process([*command, phone.as_uri()], 60)
    assert re.findall(r"<title>(\d+)</title>", done.stdout) in (["360"], ["345"]), done.stdout[-300:]
