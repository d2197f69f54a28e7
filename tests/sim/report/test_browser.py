"""The report in a real browser, where there is one: its figures are drawn, and nothing is complained about."""

import subprocess
from pathlib import Path

import pytest
from matplotlib.image import imread

from emberkv.sim.report import render_report
from tests.browser import BROWSER, needs_browser
from tests.sim.report.build import Page, run

pytestmark = needs_browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("browser") / "report.html"
    path.write_text(render_report({"chats": run()}), encoding="utf-8")
    return path


def browse(report: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """What the page's own console says comes on standard error, marked CONSOLE."""
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={report.parent / 'profile'}", "--window-size=1200,2800", *options, report.as_uri(),
    ]  # fmt: skip
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert outcome.returncode == 0, outcome.stderr
    return outcome


def test_all_figures_are_in_the_document_and_nothing_is_complained_about(report: Path) -> None:
    outcome = browse(report, "--dump-dom")
    assert "CONSOLE" not in outcome.stderr
    page = Page(outcome.stdout)
    assert len(page.of("figure")) == len(page.of("svg")) == 6
    assert "time to first token, s" in page.texts["text"]


def test_the_page_is_painted(report: Path) -> None:
    picture = report.parent / "page.png"
    browse(report, f"--screenshot={picture}")
    pixels = imread(picture)[..., :3]
    dark = (pixels.sum(axis=2) < 1.5).mean()
    blue = (pixels[..., 2] > pixels[..., 0] + 0.3).mean()
    assert 0.005 < dark < 0.5  # text and axes on white
    assert blue > 0.0005  # the curves
