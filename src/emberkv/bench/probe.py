"""The doorstep: what must be known of a server before it is measured."""

import httpx
from pydantic import BaseModel, ValidationError

from emberkv.bench.client import Clock, Target, ask
from emberkv.bench.workload import Workload
from emberkv.errors import ConfigError

SHORT_WORDS, LONG_WORDS = 32, 288


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


async def first_model(client: httpx.AsyncClient) -> str:
    """The first name of ``/v1/models``. Raises ConfigError when the server cannot be asked or names none."""
    accepted = "the URL of a running OpenAI-compatible server, and its key where it needs one"
    try:
        response = await client.get("/v1/models")
        response.raise_for_status()
        models = _Models.model_validate_json(response.content).data
    except (httpx.HTTPError, ValidationError) as error:
        raise ConfigError(f"{client.base_url}/v1/models gives {error!r}; url must be {accepted}") from error
    if not models:
        raise ConfigError(f"{client.base_url}/v1/models lists no model; give one by name")
    return models[0].id


async def tokens_per_word(client: httpx.AsyncClient, target: Target, nonce: str, clock: Clock) -> float | None:
    """How many tokens the model makes of one word of ours, from two prompts of different length.

    Their difference leaves out the chat template. None when the server reports no prompt tokens. Raises ConfigError
    when it does not answer. Costs two one-token answers, which also wake a server that loads on first use.
    """
    lengths = []
    for words in (SHORT_WORDS, LONG_WORDS):
        probe = Workload(user_tokens=words, nonce=f"probe {nonce} {words}")
        answer = await ask(client, target, [probe.question(0, 0)], max_tokens=1, clock=clock)
        if answer.error:
            raise ConfigError(f"{client.base_url} does not answer a plain request: {answer.error}")
        lengths.append(answer.usage.prompt_tokens if answer.usage else None)
    short, long = lengths
    if short is None or long is None or long <= short:
        return None
    return (long - short) / (LONG_WORDS - SHORT_WORDS)
