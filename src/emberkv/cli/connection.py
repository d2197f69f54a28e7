"""How the commands that ask a server reach it: their options for the server and a key, the connection, its errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import httpx
import typer

from emberkv.errors import ConfigError, EmberError


class ServerError(EmberError):
    """The server cannot be reached, does not answer what it is asked, or may not be asked."""


LOCAL_URL = "http://127.0.0.1:8080"

ServerUrl = Annotated[str, typer.Option("--url", metavar="URL", envvar="EMBERKV_URL", help="The server.")]
AdminKey = Annotated[
    str | None,
    typer.Option("--key", envvar="EMBERKV_ADMIN_KEY", help="An API key or the admin key, where the server needs one."),
]


def connection(url: str, key: str | None) -> dict[str, Any]:
    """``base_url`` and ``headers`` of an httpx client; with a key, it authenticates as the key's owner.

    Raises ConfigError for a URL or a key that cannot be sent.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"--url {url!r}: use a URL such as http://127.0.0.1:8080") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"--url {url!r}: use a URL such as http://127.0.0.1:8080")
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
        raise ConfigError("--key: use a key of ASCII characters, as the server has it")
    return {"base_url": parsed, "headers": {} if key is None else {"authorization": f"Bearer {key}"}}


@contextmanager
def reaching(client: httpx.Client) -> Iterator[None]:
    """Raise ServerError for a failure to reach the client's server, with what to do about it."""
    try:
        yield
    except httpx.ConnectError as error:
        raise ServerError(
            f"{client.base_url} does not answer ({error}); start a server with 'emberkv serve', "
            "or name another with --url or EMBERKV_URL"
        ) from error
    except httpx.HTTPError as error:
        raise ServerError(f"{client.base_url} cannot be reached: {error or type(error).__name__}") from error
