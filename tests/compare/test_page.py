"""The page in a browser: it loads without errors and requests, sorts, shows its plots, and fits a phone and paper."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from zoo.compare.report import make_report

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--enable-logging=stderr",
)  # fmt: skip

PROBE = """<script>
window.addEventListener("load", () => {
  const table = document.querySelector("table.sortable");
  const heads = [...table.querySelectorAll("thead tr:last-child th")];
  const names = () => [...table.tBodies[0].rows].map(r => r.children[0].dataset.v);
  const column = heads.findIndex(h => h.textContent.includes("bits/byte"));
  const press = n => {
    heads[n].querySelector("button").click();
    return [heads[n].getAttribute("aria-sort"), names()];
  };
  const boxes = [...document.querySelectorAll("svg.chart, svg.mask")].map(svg => {
    const paths = [...svg.querySelectorAll("path, use")].map(e => e.getBBox()).filter(b => b.width + b.height > 0);
    const texts = [...svg.querySelectorAll("text")].filter(t => t.getBoundingClientRect().width > 0);
    const box = svg.getBoundingClientRect();
    const counts = {paths: paths.length, texts: texts.length, name: svg.ariaLabel};
    return {wide: box.width, high: box.height, ...counts};
  });
  const outside = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, pre, svg") &&
    e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.className || e.tagName);
  const ink = getComputedStyle(document.querySelector("svg.chart text")).fill;
  const told = {descending: press(column), ascending: press(column), named: press(0), boxes, outside, ink,
    wide: document.documentElement.scrollWidth, screen: document.documentElement.clientWidth,
    requests: performance.getEntriesByType("resource").map(e => e.name)};
  document.title = JSON.stringify(told);
});
</script></body>"""


@pytest.fixture(scope="module")
def look(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[dict[str, Any], str]]:
    """``look(page, *options)`` opens the page, presses its headings and returns what it saw, and the browser's log."""

    def opened(page: Path, *options: str) -> tuple[dict[str, Any], str]:
        folder = tmp_path_factory.mktemp("browser")
        probed = folder / "page.html"
        probed.write_text(page.read_text().replace("</body>", PROBE))
        profile = f"--user-data-dir={folder / 'profile'}"
        command = [str(BROWSER), *QUIET, profile, "--virtual-time-budget=3000", *options, "--dump-dom", probed.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
        found = re.search(r"<title>(\{.*?\})</title>", done.stdout, re.S)
        assert found is not None, done.stderr[-800:]
        told: dict[str, Any] = json.loads(
            found[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        )
        return told, done.stderr

    return opened


def test_it_loads_sorts_and_draws(demo: Path, tmp_path: Path, look: Callable[..., tuple[dict[str, Any], str]]) -> None:
    told, log = look(make_report([demo], tmp_path / "report.html"), "--window-size=1280,900")
    assert "CONSOLE" not in log  # errors and refusals of the page's own policy alike
    assert told["requests"] == []
    assert told["descending"][0] == "descending"
    assert told["ascending"][0] == "ascending"
    rising = ["llava+connector=mlp", "llava+connector=linear", "llava+connector=qformer"]
    assert told["ascending"][1][:3] == rising
    assert [name for name in told["descending"][1] if name in rising] == rising[::-1]
    assert told["ascending"][1][-1] == told["descending"][1][-1] == "clip"  # it has no such value
    assert told["named"] == ["ascending", sorted(told["named"][1])]
    assert len(told["boxes"]) >= 12
    for box in told["boxes"]:
        assert box["wide"] > 150, box
        assert box["high"] > 80, box
        assert box["paths"] > 2, box
        assert box["texts"] > 0, box


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_by_day_and_by_night(
    demo: Path, tmp_path: Path, look: Callable[..., tuple[dict[str, Any], str]], scheme: str
) -> None:
    page = make_report([demo], tmp_path / "report.html")
    option = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    told, log = look(page, "--window-size=500,900", option)  # the narrowest window a headless browser opens
    assert "CONSOLE" not in log
    assert told["outside"] == []
    assert told["wide"] <= told["screen"]
    assert told["ink"] == {"light": "rgb(90, 100, 114)", "dark": "rgb(154, 164, 178)"}[scheme]


def test_a_page_from_a_server_asks_for_nothing_else(demo: Path, tmp_path: Path) -> None:
    make_report([demo], tmp_path / "served" / "report.html")
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "served"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/report.html"
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [str(BROWSER), *QUIET, profile, "--virtual-time-budget=2000", "--dump-dom", address]
        subprocess.run(command, capture_output=True, timeout=180, check=True)
        server.shutdown()
    assert [path for path in asked if path != "/favicon.ico"] == ["/report.html"]  # the browser itself asks for an icon


def test_it_prints(demo: Path, tmp_path: Path) -> None:
    page = make_report([demo], tmp_path / "report.html")
    pdf = tmp_path / "report.pdf"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [str(BROWSER), *QUIET, profile, "--no-pdf-header-footer", f"--print-to-pdf={pdf}", page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=180, check=True)
    data = pdf.read_bytes()
    assert data.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 14
