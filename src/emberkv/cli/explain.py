"""``emberkv explain``: ask a server why a prompt misses its cache, and show the answer on a terminal."""

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import httpx
import typer
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from emberkv.cli.connection import LOCAL_URL, AdminKey, ServerError, ServerUrl, connection, reaching
from emberkv.cli.explain_template import explain_template
from emberkv.cli.suggestions import Suggestions, print_suggestions
from emberkv.errors import RequestError
from emberkv.serving.api.validation import is_anthropic

BAR_CELLS = 60
_PROMPT_FIELDS = ("messages", "prompt", "input")
"""One of them is in each request: a conversation's, a completion's and a response's."""
LABEL_CELLS = 15
BEFORE_SHARE = 0.4
"""Of the columns for the texts around a first difference, the share that the text before it has."""

_TIERS = ("green", "cyan", "blue", "bright_blue")
_REASONS = {
    "diverged": "red", "evicted": "yellow", "removed": "yellow", "cleared": "yellow", "new": "magenta",
    "load-failed": "bright_red",
}  # fmt: skip
_OTHER = "bright_black"
_MEANINGS = {
    "new": "never seen before",
    "diverged": "what is cached goes on with other tokens",
    "evicted": "it was cached",
    "removed": "it was cached",
    "cleared": "it was cached",
    "other-model": "cached for another model",
    "other-tenant": "cached for another tenant",
    "recompute": "computing was expected to be faster than loading",
    "look-up": "a tier in the network may have it, and is asked for requests only",
    "load-failed": "loading failed or came too late",
    "inexact": "cached, but not bit-equal to a cold prefill, which --exact asks for",
    "collision": "its hash is taken by other tokens",
    "cache-off": "the server runs without its prefix cache",
    "alignment": "cached, but beyond the last whole unit of reuse",
    "partial": "the last block, which is not full or holds the prompt's end",
    "too-short": "no longer than one unit of reuse",
    "last-token": "always computed: its scores choose the next one",
}


WHY = {
    "least_cost": "its first token is expected soonest, and its cost is the least",
    "session": "it costs as little as any, and has the session",
    "tie": "it costs as little as any, and is first by consistent hashing",
    "only": "there is no other",
    "sequence": "the request names it",
    "random": "drawn at random",
    "turn": "it is its turn",
    "least_loaded": "it has least to do",
    "hash": "by consistent hashing",
    "hash_next": "by consistent hashing, as the first one is down or too busy",
    "longest_prefix": "it has most of the prompt",
}


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Lost(_Part):
    tier: str
    how: str
    seconds_ago: float


class _Miss(_Part):
    reason: str
    start: int
    tokens: int
    lost: _Lost | None = None


class _Divergence(_Part):
    token: int
    still_cached: bool
    before: str
    expected: str
    found: str


class _Elsewhere(_Part):
    tokens: int
    tenant: str | None = None
    model: str | None = None


class _Estimate(_Part):
    """Seconds; see "Routing" in docs/cluster.md. cached_tokens: by tier, as the gateway knows it."""

    waiting: float
    computing: float
    cost: float
    loading: dict[str, float]
    cached_tokens: dict[str, int]


class Candidate(_Part):
    """A worker that the prompt could go to. estimate: None where the policy makes none. shared_tiers: with others."""

    worker: str
    hit_tokens: int | None = None
    error: str | None = None
    estimate: _Estimate | None = None
    shared_tiers: tuple[str, ...] = ()


class _Answer(_Part):
    """The server's answer; see ``emberkv.serving.cache.service``. worker, why, workers: of a gateway."""

    prompt_tokens: int
    hit_tokens: int
    hit_tokens_by_tier: dict[str, int]
    misses: list[_Miss]
    divergence: _Divergence | None = None
    canonical: dict[str, int] = {}
    elsewhere: list[_Elsewhere] = []
    worker: str | None = None
    why: str | None = None
    workers: list[Candidate] = []


def view(answer: _Answer, columns: int) -> RenderableType:
    """Everything that the answer says, to be printed in lines of at most ``columns`` cells."""
    parts: list[RenderableType] = [_headline(answer), _bar(answer), _legend(answer)]
    if answer.divergence is not None:
        parts += [Text(), *_difference(answer.divergence, columns)]
    if answer.elsewhere:
        parts += [Text(), *(_out_of_reach(each) for each in answer.elsewhere)]
    if answer.canonical:
        changed = ", ".join(f"{name} ({count})" for name, count in answer.canonical.items())
        parts += [Text(), Text(f"Canonical rules changed the prompt: {changed}.")]
    if answer.worker is not None:
        parts += [Text(), *_route(answer)]
    return Group(*parts)


def _route(answer: _Answer) -> list[RenderableType]:
    """Which worker of a gateway the prompt goes to, and what was expected of each."""
    why = "" if answer.why is None else f" ({WHY.get(answer.why, answer.why)})"
    parts: list[RenderableType] = [Text(f"Worker {_on_one_line(answer.worker or '')}{why}")]
    if answer.workers:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("worker", overflow="fold")
        for name in ("cached", "waiting", "loading", "computing", "cost"):
            table.add_column(name, justify="right")
        table.add_column("known to the gateway", overflow="fold")
        for each in answer.workers:
            table.add_row(*_candidate(each), style="bold" if each.worker == answer.worker else "")
        parts.append(table)
    return parts


def _candidate(each: Candidate) -> list[str]:
    cached = "?" if each.hit_tokens is None else f"{each.hit_tokens:,}"
    if each.estimate is None:
        return [_on_one_line(each.worker), cached, "", "", "", "", _on_one_line(each.error or "")]
    found, shared = each.estimate, each.shared_tiers
    seconds = (found.waiting, sum(found.loading.values()), found.computing, found.cost)
    known = ", ".join(f"{tier} {n:,}{' (shared)' if tier in shared else ''}" for tier, n in found.cached_tokens.items())
    return [
        _on_one_line(each.worker),
        cached,
        *(f"{value:.3g} s" for value in seconds),
        _on_one_line(each.error or known),
    ]


def _headline(answer: _Answer) -> Text:
    tenths_of_percent = answer.hit_tokens * 1000 // max(1, answer.prompt_tokens)  # rounded down: 100% is all of them
    return Text.assemble(
        (f"{answer.hit_tokens:,} of {answer.prompt_tokens:,} prompt tokens reused", "bold"),
        f" ({tenths_of_percent / 10:.1f}%)",
    )


def _segments(answer: _Answer) -> list[tuple[str, int, str]]:
    """(what, tokens, style) in the order of the prompt."""
    hits = [
        (tier, tokens, _TIERS[min(index, len(_TIERS) - 1)])
        for index, (tier, tokens) in enumerate(answer.hit_tokens_by_tier.items())
    ]
    return hits + [(miss.reason, miss.tokens, _REASONS.get(miss.reason, _OTHER)) for miss in answer.misses]


def _bar(answer: _Answer) -> Text:
    """Hits are full blocks, misses light ones; every segment has at least one cell."""
    bar = Text()
    hits = len(answer.hit_tokens_by_tier)
    for index, (_, tokens, style) in enumerate(_segments(answer)):
        cells = max(1, round(BAR_CELLS * tokens / max(1, answer.prompt_tokens)))
        bar.append(("█" if index < hits else "░") * cells, style)
    return bar


def _legend(answer: _Answer) -> Table:
    table = Table.grid(padding=(0, 2))
    for _ in range(2):
        table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for index, (tier, tokens, style) in enumerate(_segments(answer)[: len(answer.hit_tokens_by_tier)]):
        start = sum(list(answer.hit_tokens_by_tier.values())[:index])
        table.add_row(Text("█", style), Text(tier), f"{tokens:,}", Text(f"from token {start:,}"))
    for miss in answer.misses:
        meaning = Text(f"from token {miss.start:,}: {_MEANINGS.get(miss.reason, miss.reason)}{_lost(miss.lost)}")
        table.add_row(Text("░", _REASONS.get(miss.reason, _OTHER)), Text(miss.reason), f"{miss.tokens:,}", meaning)
    return table


def _lost(lost: _Lost | None) -> str:
    if lost is None:
        return ""
    by = " by the operator" if lost.how in ("removed", "cleared") else ""
    return f"; {lost.how} from {lost.tier}{by} {_ago(lost.seconds_ago)} ago"


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _difference(divergence: _Divergence, columns: int) -> list[Text]:
    """The texts that differ, one under the other, and a caret under the first difference."""
    cells = max(2, columns - LABEL_CELLS)
    most_before = int(cells * BEFORE_SHARE)
    known = "is cached" if divergence.still_cached else "was cached"
    before = _last_cells(_on_one_line(divergence.before), most_before)
    lines = [Text(f"The first difference is at token {divergence.token:,}:")]
    for label, text, style in ((known, divergence.expected, "green"), ("this prompt", divergence.found, "red")):
        lines.append(
            Text.assemble(
                f"  {label:<11}  ", before, (_first_cells(_on_one_line(text), cells - cell_len(before)), style)
            )
        )
    lines.append(Text(" " * (LABEL_CELLS + cell_len(before)) + "^", "bold"))
    return lines


def _out_of_reach(elsewhere: _Elsewhere) -> Text:
    whose = f"Tenant {elsewhere.tenant}" if elsewhere.model is None else f"For model {elsewhere.model}, the cache"
    return Text(f"{_on_one_line(whose)} has {elsewhere.tokens:,} of these tokens.")


def _on_one_line(text: str) -> str:
    """Control characters written as Python writes them, so that the caret stays in its column."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def _first_cells(text: str, cells: int) -> str:
    return text if cell_len(text) <= cells else set_cell_size(text, cells - 1).rstrip() + "…"


def _last_cells(text: str, cells: int) -> str:
    if cell_len(text) <= cells:
        return text
    while cell_len(text) > cells - 1:
        text = text[1:]
    return "…" + text


PATH = "/v1/cache/explain"
SUGGESTIONS_PATH = "/v1/cache/suggestions"


class Api(Enum):
    OPENAI = "openai"
    ANTHROPIC = "anthropic"


Source = Annotated[
    str | None, typer.Argument(help="A file with a request's JSON or a prompt's text; - reads standard input.")
]
PromptText = Annotated[str | None, typer.Option(help="A prompt's text, instead of a file.")]
ResponseId = Annotated[str | None, typer.Option(help="A past response's id, instead of a prompt.")]
Raw = Annotated[bool, typer.Option("--raw", help="The text, or the file as it is, is the whole prompt.")]
ApiName = Annotated[Api | None, typer.Option(help="The API of the request's JSON; default: inferred from its fields.")]
Template = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL|FILE",
        help="Show instead what the next turn can reuse with this model's chat template, or the one in a file.",
    ),
]
Tenant = Annotated[str | None, typer.Option(help="The prompt's tenant; needs the admin key.")]
Suggest = Annotated[
    bool,
    typer.Option(
        "--suggest",
        help="Show lines of prompts that change with each session, and a file of canonical rules for them.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's answer as it is.")]


def explain(
    source: Source = None,
    *,
    text: PromptText = None,
    response_id: ResponseId = None,
    raw: Raw = False,
    api: ApiName = None,
    template: Template = None,
    tenant: Tenant = None,
    url: ServerUrl = LOCAL_URL,
    key: AdminKey = None,
    suggest: Suggest = False,
    as_json: AsJson = False,
) -> None:
    """Say where a prompt's tokens come from: which are cached, and why the others are not.

    Exits with 2 when the server cannot be reached.
    """
    if template is not None:
        if suggest or any(given is not None for given in (source, text, response_id, tenant)):
            raise RequestError(
                "--template stands alone: leave out the file, --text, --response-id, --tenant, --suggest"
            )
        explain_template(template, as_json=as_json)
        return
    if suggest and any(given is not None for given in (source, text, response_id, tenant)):
        raise RequestError("--suggest is about all prompts; give no file, --text, --response-id or --tenant with it")
    question = None if suggest else _question(source, text, response_id, raw, api)
    if question is not None and tenant is not None:
        question["tenant"] = tenant
    with httpx.Client(**connection(url, key), timeout=60) as client:
        answer = ask(client, question)
    console = Console(markup=False, highlight=False)
    if as_json:
        typer.echo(json.dumps(answer, ensure_ascii=False, indent=1))
    elif suggest:
        print_suggestions(console, _checked(answer, Suggestions).data)
    else:
        console.print(view(_checked(answer, _Answer), console.width))


def ask(client: httpx.Client, question: dict[str, Any] | None) -> dict[str, Any]:
    """The explanation, or where there is no question, the suggestions. Raises ServerError when none come back."""
    with reaching(client):
        response = client.get(SUGGESTIONS_PATH) if question is None else client.post(PATH, json=question)
    try:
        answer = response.json()
    except ValueError as error:
        raise ServerError(f"{client.base_url} is no emberkv server: its answer is not JSON") from error
    if response.status_code != 200 or not isinstance(answer, dict):
        problem = answer.get("error") if isinstance(answer, dict) else None
        problem = problem if isinstance(problem, dict) else {}
        is_nameless = problem.get("param") == "tenant" and "tenant" not in (question or {})
        hint = "; name it with --tenant" if is_nameless else ""
        if response.status_code == httpx.codes.UNAUTHORIZED:
            hint = "; give one with --key or EMBERKV_ADMIN_KEY"
        message = problem.get("message") or response.text[:200]
        raise ServerError(f"{client.base_url} answers {response.status_code}: {message}{hint}")
    return answer


def question_of(content: str, *, raw: bool = False, api: Api | None = None) -> dict[str, Any]:
    """What to ask about a file's content: a request's JSON, or else a prompt's text; with ``raw``, always that."""
    request = None if raw else _json_object(content)
    if request is None:
        return _about_text(content, raw)
    if api is None:
        api = Api.ANTHROPIC if "input" not in request and is_anthropic(request) else Api.OPENAI
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
    if not raw and Path(source).suffix == ".json" and _json_object(content) is None:
        raise RequestError(
            f"{source} is no request; it must be a JSON object with one of {', '.join(_PROMPT_FIELDS)}. "
            "A file with a prompt's text may have any name that does not end with .json, or any with --raw"
        )
    return question_of(content, raw=raw, api=api)


def _about_text(text: str, raw: bool) -> dict[str, Any]:
    return {Api.OPENAI.value: {"prompt": text} if raw else {"messages": [{"role": "user", "content": text}]}}


def _json_object(content: str) -> dict[str, Any] | None:
    """A request's JSON, if the content is that."""
    try:
        value = json.loads(content)
    except ValueError:
        return None
    return value if isinstance(value, dict) and any(field in value for field in _PROMPT_FIELDS) else None


Shape = TypeVar("Shape", bound=BaseModel)


def _checked(answer: dict[str, Any], shape: type[Shape]) -> Shape:
    try:
        return shape.model_validate(answer)
    except ValidationError as error:
        raise ServerError(f"the server's answer is no explanation: {error.errors()[0]['msg']}") from error
