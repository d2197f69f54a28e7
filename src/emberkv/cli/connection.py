"""How the commands that ask a server reach it."""

from typing import Any

import httpx

from emberkv.errors import ConfigError


def connection(url: str, key: str | None, key_option: str) -> dict[str, Any]:
    """``base_url`` and ``headers`` of an httpx client; with a key, it authenticates as the key's owner.

    key_option: the option that gives the key, as typed. Raises ConfigError for a URL or a key that cannot be sent.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"--url {url!r}: use a URL such as http://127.0.0.1:8080") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"--url {url!r}: use a URL such as http://127.0.0.1:8080")
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
        raise ConfigError(f"{key_option}: use a key of ASCII characters, as the server has it")
    return {"base_url": parsed, "headers": {} if key is None else {"authorization": f"Bearer {key}"}}
