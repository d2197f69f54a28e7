"""``python -m emberkv``: the same as the ``emberkv`` command."""

from emberkv.cli.main import app

if __name__ == "__main__":
    app(prog_name="emberkv")
