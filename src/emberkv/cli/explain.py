"""``emberkv explain``: ask a server why a prompt misses its cache, and print the answer readably."""

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from pydantic import ValidationError
from rich.console import Console

from emberkv.cli.command import connection
from emberkv.cli.explanation_view import Answer, view
from emberkv.errors import EmberError, RequestError

PATH = "/v1/cache/explain"


class Api(Enum):
    OPENAI = "openai"
    ANTHROPIC = "anthropic"


class ExplainError(EmberError):
    """The server cannot be reached, or does not answer the question."""


def explain(
    source: Annotated[
        str | None, typer.Argument(help="A file with a request's JSON or a prompt's text; - reads standard input.")
    ] = None,
    *,
    text: Annotated[str | None, typer.Option(help="A prompt's text, instead of a file.")] = None,
    response_id: Annotated[str | None, typer.Option(help="A past response's id, instead of a prompt.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="A text is the whole prompt, not a user's message.")] = False,
    api: Annotated[
        Api | None, typer.Option(help="The API of the request's JSON; default: inferred from its fields.")
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="The prompt's tenant; needs the admin key.")] = None,
    url: Annotated[
        str, typer.Option(metavar="URL", envvar="EMBERKV_URL", help="The server.")
    ] = "http://127.0.0.1:8080",
    key: Annotated[
        str | None,
        typer.Option(envvar="EMBERKV_ADMIN_KEY", help="An API key or the admin key, where the server needs one."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's answer as it is.")] = False,
) -> None:
    """Say where a prompt's tokens come from: which are cached, and why the others are not.

    Exits with 2 when the server cannot be reached.
    """
    question = _question(source, text, response_id, raw, api)
    if tenant is not None:
        question["tenant"] = tenant
    with httpx.Client(**connection(url, key, "--key"), timeout=60) as client:
        answer = ask(client, question)
    console = Console(markup=False, highlight=False)
    if as_json:
        typer.echo(json.dumps(answer, ensure_ascii=False, indent=1))
    else:
        console.print(view(_checked(answer), console.width))


def ask(client: httpx.Client, question: dict[str, Any]) -> dict[str, Any]:
    """Raises ExplainError when no explanation comes back."""
    try:
        response = client.post(PATH, json=question)
        answer = response.json()
    except httpx.ConnectError as error:
        raise ExplainError(
            f"{client.base_url} does not answer ({error}); is the server running? "
            "Name another with --url or EMBERKV_URL"
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ExplainError(f"{client.base_url} cannot be reached: {error or type(error).__name__}") from error
    except ValueError as error:
        raise ExplainError(f"{client.base_url} is no emberkv server: its answer is not JSON") from error
    if response.status_code != 200 or not isinstance(answer, dict):
        problem = answer.get("error") if isinstance(answer, dict) else None
        problem = problem if isinstance(problem, dict) else {}
        hint = "; name it with --tenant" if problem.get("param") == "tenant" and "tenant" not in question else ""
        if response.status_code == httpx.codes.UNAUTHORIZED:
            hint = "; give one with --key or EMBERKV_ADMIN_KEY"
        message = problem.get("message") or response.text[:200]
        raise ExplainError(f"{client.base_url} answers {response.status_code}: {message}{hint}")
    return answer


def question_of(content: str, *, raw: bool = False, api: Api | None = None) -> dict[str, Any]:
    """What to ask about a file's content: a request's JSON, or else a prompt's text."""
    request = _json_object(content)
    if request is None:
        return _about_text(content, raw)
    if api is None:
        api = Api.ANTHROPIC if "system" in request or _has_anthropic_parts(request) else Api.OPENAI
    return {api.value: request}


def _question(
    source: str | None, text: str | None, response_id: str | None, raw: bool, api: Api | None
) -> dict[str, Any]:
    if sum(given is not None for given in (source, text, response_id)) != 1:
        raise RequestError("give one of: a file, --text, --response-id")
    if response_id is not None:
        return {"response_id": response_id}
    if text is not None:
        return _about_text(text, raw)
    assert source is not None
    try:
        content = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{source} cannot be read: {error}") from error
    return question_of(content, raw=raw, api=api)


def _about_text(text: str, raw: bool) -> dict[str, Any]:
    return {Api.OPENAI.value: {"prompt": text} if raw else {"messages": [{"role": "user", "content": text}]}}


def _json_object(content: str) -> dict[str, Any] | None:
    """A request's JSON, if the content is that."""
    try:
        value = json.loads(content)
    except ValueError:
        return None
    return value if isinstance(value, dict) and ("messages" in value or "prompt" in value) else None


def _has_anthropic_parts(request: dict[str, Any]) -> bool:
    """Whether tools are as Anthropic's API has them; messages alone look alike in both."""
    tools = request.get("tools")
    return isinstance(tools, list) and any(isinstance(tool, dict) and "input_schema" in tool for tool in tools)


def _checked(answer: dict[str, Any]) -> Answer:
    try:
        return Answer.model_validate(answer)
    except ValidationError as error:
        raise ExplainError(f"the server's answer is no explanation: {error.errors()[0]['msg']}") from error
