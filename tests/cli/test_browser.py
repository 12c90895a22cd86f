"""Every page that a command writes, in a real browser: on a phone and on a desk, in light and in dark."""

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTHS = (390, 1280)
DARK = "--blink-settings=preferredColorScheme=0"
UNLOGGED = "classes"  # its run is over before the first step that is logged, and had nothing to evaluate on
LOWEST_CONTRAST = 4.5  # https://www.w3.org/TR/WCAG21/#contrast-minimum


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@pytest.fixture(scope="module")
def look(tmp_path_factory):
    """Opens pages in frames of all widths; returns what `measure.html` found, and the errors of the console."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser is installed ({', '.join(BROWSERS)})")
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(Path(__file__).with_name("measure.html"), folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def call(pages, *flags):
        for name, page in pages.items():
            (folder / name).write_text(page)
        address = f"http://127.0.0.1:{server.server_port}/measure.html"
        asked = f"{address}?pages={','.join(pages)}&widths={','.join(map(str, WIDTHS))}"
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
        profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
        done = subprocess.run(
            [browser, *words, profile, "--virtual-time-budget=20000", "--dump-dom", *flags, asked],
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        found = re.search(r'<pre id="measured">(.+?)</pre>', done.stdout, re.DOTALL)
        assert found, done.stderr[-2000:]
        return json.loads(html.unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    yield call
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def pages(lora, classifier, prefix, tmp_path_factory):
    from typer.testing import CliRunner

    from deltatune.cli.app import app

    trace = tmp_path_factory.mktemp("trace") / "trace.html"
    words = ["trace", str(prefix), "--text", "red cat", "--target", "cat red", "--html", str(trace)]
    assert CliRunner().invoke(app, words).exit_code == 0
    found = {folder.name: (folder / "report.html").read_text() for folder in (lora, classifier, prefix)}
    # values and texts of samples with a word that no line has room for
    long = re.sub(r"<dd>(<strong>)?", lambda start: f"{start[0]}{'x' * 400} ", found[lora.name])
    return {f"{name}.html": text for name, text in {**found, "trace": trace.read_text(), "long": long}.items()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_readable_at_every_width(look, pages, scheme):
    found, errors = look(pages, *([DARK] if scheme == "dark" else []))
    assert errors == []
    assert [(one["page"], one["width"]) for one in found] == [(page, width) for page in pages for width in WIDTHS]
    for one in found:
        where = (one["page"], one["width"], scheme)
        assert one["dark"] == (scheme == "dark"), where
        assert one["scroll"] == one["width"], where
        assert one["wide"] == [], where
        assert one["outside"] == 0, where
        assert one["worst"]["contrast"] >= LOWEST_CONTRAST, (where, one["worst"])
        assert one["smallest"]["size"] >= 10, (where, one["smallest"])
        assert all(points > 1 for points in one["curves"]), where
        if one["page"] not in ("trace.html", f"{UNLOGGED}.html"):
            assert len(one["curves"]) == 3, where  # training, smoothed and raw, and the evaluation


def test_the_measure_finds_what_is_wrong(look):
    """A page with every fault: the test above could fail."""
    page = (
        '<body style="margin:0;background:#fff"><p style="color:#999;font-size:8px">pale</p>'
        '<div style="width:2000px">wide</div><svg><polyline points="1,1 1,1"/></svg>'
        "<script>console.error('fault'); nothing()</script>"
    )
    found, errors = look({"bad.html": page})
    assert {one["scroll"] for one in found} == {2000}
    assert all(one["wide"] for one in found)
    assert found[0]["worst"]["text"] == "pale" and found[0]["worst"]["contrast"] == pytest.approx(2.85, abs=0.01)
    assert found[0]["smallest"]["size"] == 8
    assert found[0]["curves"] == [1]
    assert len(errors) == 2 * len(WIDTHS)
