"""``emberkv launch``: start a coding agent with a running server as its model, or print the settings for that."""

import json
import os
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, TypeVar
from urllib.parse import quote

import httpx
import typer
from pydantic import BaseModel, Field, ValidationError

from emberkv.cli.command import error_console
from emberkv.cli.connection import LOCAL_URL, ServerError, ServerUrl, connection, reaching
from emberkv.errors import ConfigError, EmberError

NO_KEY = "none"
"""The API key for clients that require one, when the server does not."""

LARGEST_ANSWER = 32_000
ANSWER_SHARE = 8
"""The context divided by this is the longest answer that a client is configured for. Clients compact a conversation
when less than the longest answer is left, and their first prompt has about 20,000 tokens.
"""

POLL_SECONDS = 0.5
"""Seconds between two requests to a server that is loading its model."""


class Client(Enum):
    """The supported coding agents."""

    CLAUDE = "claude"
    CODEX = "codex"
    OPENCODE = "opencode"
    QWEN = "qwen"


PACKAGES = {
    Client.CLAUDE: "@anthropic-ai/claude-code",
    Client.CODEX: "@openai/codex",
    Client.OPENCODE: "opencode-ai",
    Client.QWEN: "@qwen-code/qwen-code",
}
"""The npm package of each client. A client's program has the client's name."""


class LaunchError(EmberError):
    """The client cannot be started."""


class _Card(BaseModel):
    """A model card of ``/v1/models``. max_model_len: tokens of the model's context."""

    id: str
    max_model_len: int


class _Models(BaseModel):
    data: Annotated[list[_Card], Field(min_length=1)]


class _Failure(BaseModel):
    message: str


class _Refusal(BaseModel):
    error: _Failure


class _Ready(BaseModel):
    status: str


Shape = TypeVar("Shape", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class ServerTarget:
    """The server and the model that a client is configured for.

    url: without ``/v1``. context_length: of the model, in tokens. key: an API key; None if the server needs none.
    """

    url: str
    model: str
    context_length: int
    key: str | None = None

    @property
    def max_answer_tokens(self) -> int:
        """The longest answer that the client is configured for, in tokens."""
        return min(LARGEST_ANSWER, self.context_length // ANSWER_SHARE)


@dataclass(frozen=True, slots=True)
class Invocation:
    """A client's program, with the arguments and environment variables that configure it for a server."""

    program: str
    arguments: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    def as_shell(self) -> str:
        """The equivalent lines of a POSIX shell."""
        lines = [f"export {name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return "\n".join([*lines, shlex.join([self.program, *self.arguments])])


def invocation(client: Client, target: ServerTarget, arguments: Sequence[str] = ()) -> Invocation:
    """The invocation of the client for the target. arguments: the user's own, which come last."""
    own, variables = {
        Client.CLAUDE: _claude,
        Client.CODEX: _codex,
        Client.OPENCODE: _opencode,
        Client.QWEN: _qwen,
    }[client](target)
    return Invocation(client.value, (*own, *arguments), variables)


def _claude(target: ServerTarget) -> tuple[list[str], dict[str, str]]:
    return [], {
        "ANTHROPIC_BASE_URL": target.url,
        "ANTHROPIC_AUTH_TOKEN": target.key or NO_KEY,
        "ANTHROPIC_API_KEY": "",  # otherwise, the user's key for Anthropic would be sent to this server
        "ANTHROPIC_MODEL": target.model,
        "ANTHROPIC_DEFAULT_OPUS_MODEL": target.model,
        "ANTHROPIC_DEFAULT_SONNET_MODEL": target.model,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": target.model,
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(target.context_length),
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(target.max_answer_tokens),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }


def _codex(target: ServerTarget) -> tuple[list[str], dict[str, str]]:
    settings: dict[str, str | int] = {
        "model": target.model,
        "model_provider": "emberkv",
        "model_context_window": target.context_length,
        "model_providers.emberkv.name": "emberkv",
        "model_providers.emberkv.base_url": f"{target.url}/v1",
        "model_providers.emberkv.wire_api": "responses",
    }
    variables = {}
    if target.key is not None:
        settings["model_providers.emberkv.env_key"] = "EMBERKV_API_KEY"
        variables["EMBERKV_API_KEY"] = target.key
    given = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in settings.items()]  # JSON is TOML here
    return [word for setting in given for word in ("-c", setting)], variables


def _opencode(target: ServerTarget) -> tuple[list[str], dict[str, str]]:
    limit = {"context": target.context_length, "output": target.max_answer_tokens}
    model = f"emberkv/{target.model}"
    config = {
        "model": model,
        "small_model": model,
        "provider": {
            "emberkv": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "emberkv",
                "options": {"baseURL": f"{target.url}/v1", "apiKey": target.key or NO_KEY},
                "models": {target.model: {"name": target.model, "limit": limit}},
            }
        },
    }
    return [], {"OPENCODE_CONFIG_CONTENT": json.dumps(config, ensure_ascii=False)}


def _qwen(target: ServerTarget) -> tuple[list[str], dict[str, str]]:
    return ["--auth-type", "openai"], {
        "OPENAI_BASE_URL": f"{target.url}/v1",
        "OPENAI_API_KEY": target.key or NO_KEY,
        "OPENAI_MODEL": target.model,
    }


def launch(
    client: Annotated[Client, typer.Argument(metavar="CLIENT", help="One of: claude, codex, opencode, qwen.")],
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A name that the server answers to; default: its first.")
    ] = None,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="ARGUMENTS", help="The client's own, after --: launch codex MODEL -- exec"),
    ] = None,
    *,
    url: ServerUrl = LOCAL_URL,
    key: Annotated[
        str | None, typer.Option(envvar="EMBERKV_API_KEY", help="An API key, where the server needs one.")
    ] = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for a server that is loading its model.")] = 600.0,
    show: Annotated[
        bool, typer.Option("--print", help="Print the variables, with the key, and the command; start nothing.")
    ] = False,
) -> None:
    """Start a coding agent with a running server. It is configured for this run alone: none of its files is changed.

    The exit status is the agent's, or 2 when the server cannot be reached.
    """
    own = list(arguments or ())
    if model is not None and model.startswith("-"):  # launch claude -- -p "..." names no model
        own, model = [model, *own], None
    with httpx.Client(**connection(url.rstrip("/").removesuffix("/v1"), key), timeout=60.0) as http:
        try:
            target = find_target(http, model, key, wait)
        except ConfigError as error:  # launch codex -- exec "..." names the model exec
            if not own:
                raise
            name = client.value
            raise ConfigError(
                f"{error}; if {model} is meant for {name} itself, name a MODEL before it: "
                f"launch {name} MODEL -- {model}"
            ) from error
    start = invocation(client, target, own)
    if show:
        typer.echo(start.as_shell())
        return
    program = shutil.which(start.program)
    if program is None:
        raise LaunchError(
            f"there is no {start.program} on the PATH; install it with 'npm install -g {PACKAGES[client]}', "
            "or see its settings with --print"
        )
    # The client takes the terminal, signals and exit code over; no shell reads its arguments.
    os.execve(program, [start.program, *start.arguments], {**os.environ, **start.variables})  # noqa: S606 - on purpose without a shell


def find_target(http: httpx.Client, model: str | None, key: str | None, wait: float) -> ServerTarget:
    """The target for a model's name, or for the first model that the server lists if ``model`` is None.

    wait: seconds to wait for a server that is loading its model.

    Raises ServerError if the server does not answer, and ConfigError if it has no such model.
    """
    listed = _ask(http, "/v1/models", key, wait, _Models).data
    card = next((each for each in listed if model in (None, each.id)), None)
    if card is None:  # the server may accept names that it does not list
        card = _ask(http, f"/v1/models/{quote(str(model))}", key, wait, _Card)
    return ServerTarget(str(http.base_url).rstrip("/"), card.id, card.max_model_len, key)


def _ask(http: httpx.Client, path: str, key: str | None, wait: float, shape: type[Shape]) -> Shape:
    deadline = time.monotonic() + wait
    response = _get(http, path)
    if response.status_code == httpx.codes.SERVICE_UNAVAILABLE and wait > 0:
        error_console().print("Waiting until the server has loaded its model.")
        while response.status_code == httpx.codes.SERVICE_UNAVAILABLE and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            if _has_model(_get(http, "/ready")):  # which servers do not log
                response = _get(http, path)
    if response.status_code == httpx.codes.UNAUTHORIZED:
        given = "does not accept the key given" if key is not None else "needs an API key"
        raise ServerError(f"{http.base_url} {given}; give one with --key or EMBERKV_API_KEY")
    if response.status_code == httpx.codes.NOT_FOUND:
        raise ConfigError(f"MODEL: {_message(response)}")
    if response.status_code != httpx.codes.OK:
        raise ServerError(f"{http.base_url} answers {response.status_code}: {_message(response)}")
    try:
        return shape.model_validate_json(response.content)
    except ValidationError as error:
        raise ServerError(f"{http.base_url} is no emberkv server: {path} has {error.errors()[0]['msg']}") from error


def _has_model(ready: httpx.Response) -> bool:
    """Whether a server that answers so to ``/ready`` has loaded its model; its warm-up is not waited for."""
    if ready.status_code != httpx.codes.SERVICE_UNAVAILABLE:
        return True
    try:
        return _Ready.model_validate_json(ready.content).status == "warming"
    except ValidationError:
        return False


def _message(response: httpx.Response) -> str:
    """The message of an emberkv server's error, or the beginning of any other response."""
    try:
        return _Refusal.model_validate_json(response.content).error.message
    except ValidationError:
        return response.text[:200]


def _get(http: httpx.Client, path: str) -> httpx.Response:
    with reaching(http):
        return http.get(path)
