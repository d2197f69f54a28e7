"""``emberkv explain``: what it asks, over a real socket, and what it prints."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner, Result

from emberkv.cli.explain import WHY, Api, question_of
from emberkv.cli.main import app
from emberkv.cli.suggestions import NOTHING_FOUND
from emberkv.cluster.policies import RoutingReason
from emberkv.serving.canonical import Wildcard, load_rules
from tests.serving.parsing.families import FAMILIES

LOST = {"tier": "ram", "how": "evicted", "seconds_ago": 7300}
ANSWER = {
    "prompt_tokens": 400,
    "hit_tokens": 200,
    "hit_tokens_by_tier": {"pool": 160, "disk": 40},
    "misses": [
        {"reason": "evicted", "start": 200, "tokens": 100, "lost": LOST},
        {"reason": "diverged", "start": 300, "tokens": 96, "lost": None},
        {"reason": "partial", "start": 396, "tokens": 4, "lost": None},
    ],
    "divergence": {
        "token": 307,
        "still_cached": True,
        "before": "日本\n\x1b[31mIt is 2026-01-0",
        "expected": "4.\nGo on",
        "found": "5.\nGo on",
    },
    "canonical": {"date": 2},
    "elsewhere": [{"tenant": "bob", "tokens": 396}, {"model": "older", "tokens": 16}],
}  # fmt: skip

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


class _Server(ThreadingHTTPServer):
    answer: tuple[int, object] = (200, ANSWER)
    asked: list[tuple[str, str | None, Any]]


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        return None

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def do_GET(self) -> None:
        self._answer(None)

    def _answer(self, body: Any) -> None:
        self.server.asked.append((self.path, self.headers.get("authorization"), body))
        status, answer = self.server.answer
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server() -> Iterator[_Server]:
    server = _Server(("127.0.0.1", 0), _Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def invoke(server: _Server, *arguments: str, **environment: str) -> Result:
    url = f"http://127.0.0.1:{server.server_port}"
    return CliRunner().invoke(app, ["explain", "--url", url, *arguments], env={"COLUMNS": "120", **environment})


def test_the_answer_is_printed_readably(server: _Server) -> None:
    outcome = invoke(server, "--response-id", "chatcmpl-1")
    assert outcome.exit_code == 0
    assert server.asked == [("/v1/cache/explain", None, {"response_id": "chatcmpl-1"})]
    lines = [line.rstrip() for line in outcome.stdout.splitlines()]
    assert lines[0] == "200 of 400 prompt tokens reused (50.0%)"
    assert lines[1] == "█" * 30 + "░" * (15 + 14 + 1)
    assert lines[2:7] == [
        "█  pool      160  from token 0",
        "█  disk       40  from token 160",
        "░  evicted   100  from token 200: it was cached; evicted from ram 2 h ago",
        "░  diverged   96  from token 300: what is cached goes on with other tokens",
        "░  partial     4  from token 396: the last block, which is not full or holds the prompt's end",
    ]
    assert lines[8] == "The first difference is at token 307:"
    assert lines[9] == "  is cached    日本\\n\\x1b[31mIt is 2026-01-04.\\nGo on"
    assert lines[10] == "  this prompt  日本\\n\\x1b[31mIt is 2026-01-05.\\nGo on"
    assert lines[11].index("^") == cell_len(lines[9][: lines[9].index("4.")])
    assert lines[13:15] == ["Tenant bob has 396 of these tokens.", "For model older, the cache has 16 of these tokens."]
    assert lines[16] == "Canonical rules changed the prompt: date (2)."


def test_at_a_gateway_the_workers_are_compared(server: _Server) -> None:
    estimate = {"waiting": 0.25, "computing": 1.5, "cost": 4.0, "loading": {"disk": 0.75}}
    workers = [
        {
            "worker": "a",
            "hit_tokens": 200,
            "estimate": {**estimate, "cached_tokens": {"pool": 160, "disk": 32}},
            "shared_tiers": ["disk", "remote"],
        },
        {"worker": "b", "hit_tokens": None, "error": "no answer", "estimate": {**estimate, "cached_tokens": {}}},
        {"worker": "c", "hit_tokens": 0, "estimate": None},
    ]
    server.answer = 200, {**ANSWER, "worker": "a", "why": "least_cost", "workers": workers}
    lines = [line.split() for line in invoke(server, "--text", "Hi").stdout.splitlines()]
    assert lines[-5][:2] == ["Worker", "a"]
    seconds = ["0.25", "s", "0.75", "s", "1.5", "s", "4", "s"]
    assert lines[-3] == ["a", "200", *seconds, "pool", "160,", "disk", "32", "(shared)"]
    assert lines[-2] == ["b", "?", "0.25", "s", "0.75", "s", "1.5", "s", "4", "s", "no", "answer"]
    assert lines[-1] == ["c", "0"]


@pytest.mark.parametrize("how", ["removed", "cleared"])
def test_what_the_operator_did_is_said_to_be_that(server: _Server, how: str) -> None:
    misses = [{"reason": how, "start": 200, "tokens": 200, "lost": {"tier": "pool", "how": how, "seconds_ago": 5}}]
    server.answer = (200, {**ANSWER, "misses": misses})
    line = invoke(server, "--text", "Hi").stdout.splitlines()[4].rstrip()
    assert line == f"░  {how}  200  from token 200: it was cached; {how} from pool by the operator 5 s ago"


def test_the_key_goes_along(server: _Server) -> None:
    assert invoke(server, "--text", "Hi", "--key", "sesame").exit_code == 0
    assert invoke(server, "--text", "Hi", EMBERKV_ADMIN_KEY="mellon").exit_code == 0
    assert [key for _, key, _ in server.asked] == ["Bearer sesame", "Bearer mellon"]


def test_the_tenant_goes_along(server: _Server) -> None:
    invoke(server, "--text", "Hi", "--raw", "--tenant", "bob")
    assert [body for _, _, body in server.asked] == [{"openai": {"prompt": "Hi"}, "tenant": "bob"}]


def test_a_file_with_a_request_or_a_text(server: _Server, tmp_path: Path) -> None:
    path = tmp_path / "given"
    path.write_text(json.dumps(CHAT))
    invoke(server, str(path))
    path.write_text("Just a text.")
    invoke(server, str(path))
    invoke(server, str(path), "--raw")
    assert [body for _, _, body in server.asked] == [
        {"openai": CHAT},
        {"openai": {"messages": [{"role": "user", "content": "Just a text."}]}},
        {"openai": {"prompt": "Just a text."}},
    ]


@pytest.mark.parametrize(
    ("request_body", "api"),
    [
        (CHAT, "openai"),
        ({"prompt": "x"}, "openai"),
        ({"input": "x", "instructions": "Be kind.", "tools": [{"type": "function", "name": "a"}]}, "openai"),
        ({**CHAT, "system": "Be kind."}, "anthropic"),
        ({**CHAT, "tools": [{"name": "a", "input_schema": {}}]}, "anthropic"),
        ({**CHAT, "tools": [{"type": "function", "function": {"name": "a"}}]}, "openai"),
    ],
)
def test_which_api_a_request_is_of(request_body: dict[str, Any], api: str) -> None:
    assert question_of(json.dumps(request_body)) == {api: request_body}
    assert question_of(json.dumps(request_body), api=Api.ANTHROPIC) == {"anthropic": request_body}


@pytest.mark.parametrize("content", ['{"messages": [', '{"model": "tiny"}'])
def test_a_json_file_without_a_request_is_not_taken_for_a_text(server: _Server, tmp_path: Path, content: str) -> None:
    path = tmp_path / "request.json"
    path.write_text(content)
    refused = invoke(server, str(path))
    assert (refused.exit_code, server.asked) == (2, [])
    assert refused.stderr.startswith(
        f"error: {path} is no request; it must be a JSON object with one of messages, prompt"
    )


@pytest.mark.parametrize("content", ["A prompt's text.", '{"input": "x"}', json.dumps(CHAT)])
def test_with_raw_a_file_of_any_name_and_content_is_a_prompts_text(
    server: _Server, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "prompt.json"
    path.write_text(content)
    assert invoke(server, str(path), "--raw").exit_code == 0
    assert [body for _, _, body in server.asked] == [{"openai": {"prompt": content}}]


def test_json_is_passed_through(server: _Server) -> None:
    assert json.loads(invoke(server, "--text", "Hi", "--json").stdout) == ANSWER


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, {"error": {"message": "no API key was given"}}), "answers 401: no API key was given"),
        ((200, {"prompt_tokens": 4}), "the server's answer is no explanation"),
        ((200, b"<html>"), "is no emberkv server: its answer is not JSON"),
    ],
)
def test_a_server_that_does_not_explain(server: _Server, answer: tuple[int, object], message: str) -> None:
    server.answer = answer
    outcome = invoke(server, "--text", "Hi")
    assert outcome.exit_code == 2
    assert message in outcome.stderr


@pytest.mark.parametrize("arguments", [(), ("--text", "a", "--response-id", "b"), ("missing-file",)])
def test_what_cannot_be_asked(server: _Server, arguments: tuple[str, ...]) -> None:
    outcome = invoke(server, *arguments)
    assert outcome.exit_code == 2
    assert "give one of" in outcome.stderr or "missing-file cannot be read" in outcome.stderr
    assert server.asked == []


def test_nobody_listens(server: _Server) -> None:
    outcome = CliRunner().invoke(app, ["explain", "--url", "http://127.0.0.1:1", "--text", "Hi"])
    assert outcome.exit_code == 2
    assert "does not answer" in outcome.stderr
    assert "start a server with 'emberkv serve', or name another with --url or EMBERKV_URL" in outcome.stderr


def test_the_server_can_be_named_by_a_variable(server: _Server) -> None:
    environ = {"EMBERKV_URL": f"http://127.0.0.1:{server.server_port}"}
    assert CliRunner().invoke(app, ["explain", "--text", "Hi"], env=environ).exit_code == 0
    assert len(server.asked) == 1


def test_a_missing_tenant_is_told_with_its_option(server: _Server) -> None:
    server.answer = (400, {"error": {"message": "tenant is missing; this server has 'acme'", "param": "tenant"}})
    assert "this server has 'acme'; name it with --tenant" in invoke(server, "--text", "Hi").stderr


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_the_caret_stands_under_the_difference_in_any_width(server: _Server, columns: int) -> None:
    divergence = {**ANSWER["divergence"], "before": "before " * 30, "expected": "4 " * 90, "found": "5 " * 90}
    server.answer = (200, {**ANSWER, "divergence": divergence})
    lines = invoke(server, "--text", "Hi", COLUMNS=str(columns)).stdout.splitlines()
    assert max(map(cell_len, lines)) <= columns
    (cached,) = (line for line in lines if line.startswith("  is cached"))
    caret = lines[lines.index(cached) + 2]
    assert cached[caret.index("^")] == "4"


def test_all_but_one_token_is_not_100_percent(server: _Server) -> None:
    server.answer = (200, {**ANSWER, "prompt_tokens": 2034, "hit_tokens": 2033})
    assert invoke(server, "--text", "Hi").stdout.startswith("2,033 of 2,034 prompt tokens reused (99.9%)")


LONG_MATCH = "word " * 30 + "*"


def suggestion(match: str, tenant: str = "ann", tokens: int = 12_345) -> dict[str, Any]:
    rule = {"name": "today-s-date", "match": match, "action": "move"}
    return {"tenant": tenant, "rule": rule, "requests": 7, "tokens": 900, "tokens_a_day": tokens}


def test_suggestions_are_printed_with_a_file_of_rules(server: _Server, tmp_path: Path) -> None:
    server.answer = (200, {"object": "list", "data": [suggestion("Today's date: *"), suggestion(LONG_MATCH, "bob", 5)]})
    outcome = invoke(server, "--suggest", COLUMNS="80")
    assert (outcome.exit_code, server.asked) == (0, [("/v1/cache/suggestions", None, None)])
    assert [line.split() for line in outcome.stdout.splitlines()[2:4]] == [
        ["12,345", "7", "Today's", "date:", "*", "ann"],
        ["5", "7", *["word"] * 9, "bob"],
    ]
    path = tmp_path / "rules.yaml"
    path.write_text(outcome.stdout[outcome.stdout.index("lines:\n") :])
    assert [(rule.name, rule.action, rule.match) for rule in load_rules(path).lines] == [
        ("today-s-date", "move", Wildcard.parse("Today's date: *")),
        ("today-s-date-2", "move", Wildcard.parse(LONG_MATCH)),
    ]


def test_without_suggestions_it_says_so(server: _Server) -> None:
    server.answer = (200, {"object": "list", "data": []})
    assert invoke(server, "--suggest").stdout == f"{NOTHING_FOUND}\n"
    assert json.loads(invoke(server, "--suggest", "--json").stdout) == {"object": "list", "data": []}


def test_suggestions_are_about_all_prompts(server: _Server) -> None:
    outcome = invoke(server, "--suggest", "--text", "Hi")
    assert outcome.exit_code == 2
    assert "--suggest is about all prompts" in outcome.stderr
    assert server.asked == []


def test_a_template_is_explained_without_a_server(tmp_path: Path) -> None:
    template = tmp_path / "family.jinja"
    template.write_text(FAMILIES["MiniMax-M2"].template, encoding="utf-8")
    result = CliRunner().invoke(app, ["explain", "--template", str(template)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "tool calls: minimax-m2, reasoning: think" in result.stdout
    assert all(cell_len(line) <= 80 for line in result.stdout.splitlines() if str(tmp_path) not in line)
    (question,) = [line for line in result.stdout.splitlines() if line.startswith("next question")]
    assert question.split()[2] == "all"
    assert question.endswith("to answer 1")
    as_json = CliRunner().invoke(app, ["explain", "--template", str(template), "--json"], catch_exceptions=False)
    said = json.loads(as_json.stdout)
    assert (said["unit"], said["with_thoughts"]["question"]["differs_in"]) == ("characters", "answer 1")


def test_a_template_stands_alone(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["explain", "--template", "m", "--text", "Hi"], catch_exceptions=False)
    assert result.exit_code == 2
    assert "--template stands alone" in result.stderr


def test_each_reason_for_a_worker_has_a_sentence() -> None:
    assert set(WHY) == set(RoutingReason)
