"""The tenants command: make API keys."""

import secrets

import typer

from emberkv.cli.command import App
from emberkv.serving.tenancy import key_digest

KEY_BYTES = 32

app = App(name="tenants", help="Make API keys for a tenants file.")


@app.callback()
def tenants() -> None:
    """Make API keys for a tenants file."""


@app.command("key")
def key() -> None:
    """Print a new API key, drawn at random, and the line that lets it in.

    The key goes to the client; the line goes under a tenant's keys in the file given to serve as --tenants.
    """
    drawn = secrets.token_urlsafe(KEY_BYTES)
    typer.echo(f"key: {drawn}\nline: - sha256: {key_digest(drawn).hex()}")
