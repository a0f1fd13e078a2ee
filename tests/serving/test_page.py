"""The page: it needs nothing else, and in a browser it shows two answers beside each other, as they are."""

from __future__ import annotations

import re
import shutil
import time
from html import escape
from importlib.resources import files

import pytest
from starlette.responses import HTMLResponse

from tests.processes import run_process
from tests.scripted import Scripted
from tests.serving.kit import Serving, load, make_adapter, serving

PAGE = (files("rwkv_miss.serving") / "page.html").read_text(encoding="utf-8")
# Asks as a user does, and names the page when the answers have come. The browser's clock, which runs ahead by itself,
# stands still while an answer of /pause is to come.
ASK = """
const until = async (isSo) => { while (!isSo()) await fetch("/pause"); };
(async () => {
  await until(() => $("left").value);
  $("temperature").value = 0;
  $("max_tokens").value = MAX_TOKENS;
  $("question").value = "Is <i>1</i> & 1 two?";
  $("form").requestSubmit();
  await until(() => running);
  AFTER
  await until(() => !running);
  document.title = "answered";
})();
"""


def test_it_needs_nothing_else_and_inserts_text_as_text():
    assert not re.search(r"(src|href)=(?!\"data:,\")|url\(|@import|https?:", PAGE)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", PAGE)


@pytest.fixture
def browse(tmp_path):
    """`browse(server, max_tokens, after)`: the page after a question was asked in it, as the browser has it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("there is no Chromium on this machine")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", "--dump-dom"]

    def run(server: Serving, max_tokens: int, after: str = "") -> str:
        script = ASK.replace("MAX_TOKENS", str(max_tokens)).replace("AFTER", after)
        page = server.http.get("/")
        asking = HTMLResponse(page.text.replace("</body>", f"<script>{script}</script></body>"), headers=page.headers)
        del asking.headers["content-length"], asking.headers["content-encoding"]
        server.server.config.app.add_api_route("/asking", lambda: asking)
        server.server.config.app.add_api_route("/pause", lambda: time.sleep(0.05))
        done = run_process([*command, f"{server.url}/asking"], 60)
        assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
        assert "<title>answered</title>" in done.stdout, done.stdout
        return done.stdout

    return run


def boxes(page: str) -> list[tuple[str, str, str, str]]:
    """(model, thought, answer, note) of each answer, as HTML."""
    return re.findall(
        r'<strong class="">(.*?)</strong><div class="reasoning">(.*?)</div><div class="content">(.*?)</div>'
        r'<small class="(?:error)?">(.*?)</small>',
        page,
        re.DOTALL,
    )


@pytest.mark.slow
def test_two_answers_beside_each_other(browse):
    nasty = "</div><script>document.title = 'broken'</script> & é"
    text = f">\nI <b>think</b>.\n</think>\n{nasty}".encode()
    with serving(Scripted(text + b"\0", text + b"\0"), template="g1-think", prefix_cache=0) as server:
        page = browse(server, 200)
    assert '<div class="question">Is &lt;i&gt;1&lt;/i&gt; &amp; 1 two?</div>' in page
    for model, thought, answer, note in boxes(page):
        assert (model, thought, answer) == ("base", "I &lt;b&gt;think&lt;/b&gt;.", escape(nasty, quote=False))
        assert re.fullmatch(rf"{len(text) + 1} tokens, [\d.]+ s", note)
    assert len(boxes(page)) == 2


@pytest.mark.slow
def test_a_fine_tune_beside_its_base_and_the_stop_button(browse, base, tmp_path):
    adapter = make_adapter(base, tmp_path / "mine", 1)
    with serving(load(base), adapter=[f"mine={adapter}"], max_tokens=100_000) as server:
        after = (
            '$("stop").disabled || await until(() => document.querySelectorAll(".content:not(:empty)").length === 2);'
        )
        page = browse(server, 100_000, f'{after} $("stop").click();')
        assert [(model, note) for model, _, _, note in boxes(page)] == [("base", "stopped"), ("mine", "stopped")]
        assert all(answer for _, _, answer, _ in boxes(page))
        assert server.complete("a", max_tokens=1)
