"""The dashboard in a real browser, of a real server."""

import subprocess
from pathlib import Path

import httpx

from tests.browser import BROWSER, needs_browser
from tests.conftest import CheckpointFactory
from tests.e2e.process import serving
from tests.waiting import DEADLINE

PROMPT = "zebra " * 40


def rendered(url: str, profile: Path) -> str:
    """The page as it is after its script has asked for its data."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--virtual-time-budget=10000", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=DEADLINE).stdout


@needs_browser
def test_sessions_and_an_explanation_are_shown(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    flags = ("--served-name", "tiny", "--no-warmup", "--cache-ram", "3MiB")
    with serving(tmp_path, str(checkpoint("llama")), *flags) as server:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 2}
        for _ in range(2):
            headers = {"x-session-id": "<b>a session</b>"}
            answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=DEADLINE).json()
        page = rendered(f"{server.url}/dashboard#{answer['id']}", tmp_path / "profile")
    assert "&lt;b&gt;a session&lt;/b&gt;" in page
    assert page.count('class="turn"') == 2
    assert "server, ready" in page
    assert "3.0 MiB" in page  # of the pool
    cached, prompt = answer["usage"]["prompt_tokens_details"]["cached_tokens"], answer["usage"]["prompt_tokens"]
    assert cached > 0
    assert f"{cached} of {prompt} prompt tokens reused" in page
