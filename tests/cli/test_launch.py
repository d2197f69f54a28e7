"""``emberkv launch``: a client's variables and arguments, against a real server and one that answers as scripted."""

import json
import os
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from emberkv.cli.connection import ServerError
from emberkv.cli.launch import Client, Invocation, ServerTarget, find_target, invocation
from emberkv.cli.main import app
from tests.conftest import CheckpointFactory
from tests.e2e.process import EMBERKV, START_DEADLINE, clean_environment, serving
from tests.waiting import DEADLINE

TARGET = ServerTarget("http://127.0.0.1:8080", 'org/it\'s "big"', 40_960, "se cret")
CARD = {"id": "tiny", "max_model_len": 512}


@pytest.fixture(scope="module")
def url(checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(
        tmp_path_factory.mktemp("launch"), str(checkpoint("llama")), "--cache-ram", "8MiB", "--served-name", "first"
    ) as server:
        yield server.url


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["launch", *arguments])


def fake_client(folder: Path, name: str) -> Path:
    """A program of that name, which writes its arguments and its environment to a file and exits with 7."""
    record, program = folder / "record.json", folder / name
    program.write_text(
        "#!/usr/bin/env python3\nimport json, os, sys\n"
        f"json.dump([sys.argv[1:], dict(os.environ)], open({str(record)!r}, 'w'))\nsys.exit(7)\n"
    )
    program.chmod(0o755)
    return record


def test_a_client_is_started_with_its_variables_arguments_and_exit_code(url: str, tmp_path: Path) -> None:
    record = fake_client(tmp_path, "claude")
    environment = clean_environment() | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "ANTHROPIC_API_KEY": "of the vendor",
        "KEPT": "as it is",
    }
    ended = subprocess.run(
        [*EMBERKV, "launch", "claude", "--url", url, "--", "-p", "say 'hi'"],
        env=environment,
        timeout=START_DEADLINE,
        check=False,
    )
    arguments, variables = json.loads(record.read_text())
    assert ended.returncode == 7
    assert arguments == ["-p", "say 'hi'"]
    assert variables["ANTHROPIC_BASE_URL"] == url
    assert variables["ANTHROPIC_MODEL"] == "first"
    assert variables["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == "first"
    assert variables["ANTHROPIC_API_KEY"] == ""
    assert variables["KEPT"] == "as it is"


def test_print_shows_the_variables_and_starts_nothing(url: str) -> None:
    length = httpx.get(f"{url}/v1/models", timeout=DEADLINE).json()["data"][0]["max_model_len"]
    shown = run("qwen", "--url", f"{url}/v1/", "--print")
    assert shown.stdout.splitlines() == [
        f"export OPENAI_BASE_URL={url}/v1",
        "export OPENAI_API_KEY=none",
        "export OPENAI_MODEL=first",
        "qwen --auth-type openai",
    ]
    assert f"export CLAUDE_CODE_MAX_CONTEXT_TOKENS={length}\n" in run("claude", "--url", url, "--print").stdout


def test_a_name_that_is_answered_but_not_listed_can_be_launched(url: str) -> None:
    shown = run("claude", "claude-haiku-4-5", "--url", url, "--print")
    assert "export ANTHROPIC_MODEL=claude-haiku-4-5\n" in shown.stdout


def test_a_model_that_the_server_has_not_is_refused_with_those_it_has(url: str) -> None:
    refused = run("codex", "other", "--url", url, "--print")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: MODEL: model is 'other'; this server has 'first'")


def test_arguments_of_the_client_that_were_taken_for_a_model_are_told_apart(url: str) -> None:
    refused = run("codex", "--url", url, "--print", "--", "exec", "explain main.py")
    assert refused.exit_code == 2
    assert refused.stderr.endswith(
        "; if exec is meant for codex itself, name a MODEL before it: launch codex MODEL -- exec\n"
    )


def test_a_client_that_is_not_installed_is_named_with_its_package(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refused = run("opencode", "--url", url)
    assert refused.exit_code == 2
    assert "there is no opencode on the PATH; install it with 'npm install -g opencode-ai'" in refused.stderr


def test_the_shell_lines_give_a_client_the_same_arguments_and_variables(tmp_path: Path) -> None:
    """Quotes and spaces in names and keys survive the shell."""
    for client in Client:
        record = fake_client(tmp_path, client.value)
        start = invocation(client, TARGET, ["it's", "-x"])
        path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        subprocess.run(["/bin/sh", "-c", start.as_shell()], env=path, timeout=DEADLINE, check=False)
        arguments, variables = json.loads(record.read_text())
        assert arguments == list(start.arguments)
        assert start.variables.items() <= variables.items()


def test_codex_gets_a_provider_that_speaks_responses() -> None:
    start = invocation(Client.CODEX, TARGET, ["exec", "hi"])
    flags, values = start.arguments[:-2:2], start.arguments[1:-2:2]
    assert set(flags) == {"-c"}
    assert start.arguments[-2:] == ("exec", "hi")
    assert tomllib.loads("\n".join(values)) == {
        "model": TARGET.model,
        "model_provider": "emberkv",
        "model_context_window": 40_960,
        "model_providers": {
            "emberkv": {
                "name": "emberkv",
                "base_url": "http://127.0.0.1:8080/v1",
                "wire_api": "responses",
                "env_key": "EMBERKV_API_KEY",
            }
        },
    }
    assert start.variables == {"EMBERKV_API_KEY": "se cret"}


def test_opencode_gets_a_provider_with_the_model_and_its_limits() -> None:
    config = json.loads(invocation(Client.OPENCODE, TARGET).variables["OPENCODE_CONFIG_CONTENT"])
    provider = config["provider"]["emberkv"]
    assert config["model"] == config["small_model"] == f"emberkv/{TARGET.model}"
    assert provider["options"] == {"baseURL": "http://127.0.0.1:8080/v1", "apiKey": "se cret"}
    assert provider["models"][TARGET.model]["limit"] == {"context": 40_960, "output": 5_120}


def answering(*answers: tuple[int, Any]) -> httpx.Client:
    """A client of a server that gives these answers, and the last of them again and again."""
    left = list(answers)

    def answer(_: httpx.Request) -> httpx.Response:
        status, body = left.pop(0) if len(left) > 1 else left[0]
        return httpx.Response(status, json=body)

    return httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))


@pytest.mark.parametrize(("status", "body"), [(200, {"status": "ready"}), (503, {"status": "warming"})])
def test_a_server_that_loads_its_model_is_waited_for_and_its_warm_up_is_not(status: int, body: object) -> None:
    asked: list[str] = []
    loading, ready = httpx.Response(503, json={"error": {"message": "loading"}}), httpx.Response(status, json=body)
    answers = {"/v1/models": [loading, httpx.Response(200, json={"data": [CARD]})], "/ready": [loading, loading, ready]}

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        return answers[request.url.path].pop(0)

    http = httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))
    assert find_target(http, None, None, wait=DEADLINE) == ServerTarget("http://server", "tiny", 512)
    assert asked == ["/v1/models", "/ready", "/ready", "/ready", "/v1/models"]


def test_without_a_wait_a_server_that_loads_is_an_error() -> None:
    with pytest.raises(ServerError, match="answers 503: loading"):
        find_target(answering((503, {"error": {"message": "loading"}})), None, None, wait=0)


@pytest.mark.parametrize(("key", "message"), [(None, "needs an API key"), ("wrong", "does not accept the key given")])
def test_a_missing_or_wrong_key_is_said(key: str | None, message: str) -> None:
    with pytest.raises(ServerError, match=f"{message}; give one with --key or EMBERKV_API_KEY"):
        find_target(answering((401, {})), None, key, wait=0)


def test_a_server_that_is_not_running_is_said() -> None:
    refused = run("claude", "--url", "http://127.0.0.1:1", "--print")
    assert refused.exit_code == 2
    assert "http://127.0.0.1:1 does not answer" in refused.stderr


@pytest.mark.parametrize("body", [{"data": []}, {"data": [{"id": "a"}]}, ["a"]])
def test_a_list_of_models_that_lacks_what_is_needed_is_an_error(body: Any) -> None:
    with pytest.raises(ServerError, match="http://server is no emberkv server"):
        find_target(answering((200, body)), None, None, wait=0)


def test_no_key_is_shown_as_none_and_left_out_for_codex() -> None:
    target = ServerTarget("http://server", "tiny", 512)
    assert invocation(Client.CLAUDE, target).variables["ANTHROPIC_AUTH_TOKEN"] == "none"
    assert invocation(Client.CODEX, target).variables == {}
    assert Invocation("codex").as_shell() == "codex"
