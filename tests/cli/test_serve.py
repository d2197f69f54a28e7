"""``emberkv serve`` that cannot start: exit code 2, one line that says why, and the port given back."""

import json
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from emberkv import __version__
from emberkv.cli.main import app
from emberkv.serving.server import bind_socket
from tests.conftest import CheckpointFactory
from tests.machine import MACHINE_CACHE, free_ports
from tests.models import CONTEXT

Serve = Callable[..., str]


def run(*arguments: str, environ: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, arguments, env=environ, catch_exceptions=False)


@pytest.fixture
def refusal() -> Serve:
    """``refusal(*arguments)``: what is printed when the server refuses to start."""

    def serve(*arguments: str, environ: dict[str, str] | None = None) -> str:
        environ = {"EMBERKV_MACHINE_CACHE": str(MACHINE_CACHE), **(environ or {})}
        result = run("serve", *arguments, "--port", "0", environ=environ)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        return result.stderr

    return serve


def test_version() -> None:
    assert run("--version").stdout == f"emberkv {__version__}\n"


def test_help_names_every_setting() -> None:
    text = re.sub(r"\s+", " ", run("serve", "--help").stdout)
    for option in ("--cache-ram", "--exact", "--no-prefix-cache", "--served-name", "--api-key", "--eviction"):
        assert option in text


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        (["--api-key", ""], {}, "--api-key: the key is empty"),
        (["--api-key", " k "], {}, "--api-key: the key begins or ends with a blank"),
        (["--tool-parser", "x"], {}, "--tool-parser is 'x'; accepted are auto, none, harmony"),
        ([], {"EMBERKV_REASONING_PARSER": "y"}, "--reasoning-parser is 'y'; accepted are auto, none, harmony"),
        (["--admin-key", ""], {}, "--admin-key: the key is empty"),
        (["--api-key-file", "none.txt"], {}, "--api-key-file none.txt cannot be read: No such file"),
        (["--api-key-file", "empty.txt"], {}, "--api-key-file empty.txt holds no key"),
        (["--tenants", "empty.txt"], {}, "the tenants file empty.txt names no tenant"),
        ([], {"EMBERKV_API_KEYS": ""}, "EMBERKV_API_KEYS is set to nothing"),
        ([], {"EMBERKV_API_KEYS": " , "}, "EMBERKV_API_KEYS is set to nothing"),
        ([], {"EMBERKV_TENANTS": ""}, "EMBERKV_TENANTS is set to nothing"),
        ([""], {}, "model '': it must hold"),
        (["--host", ""], {}, "--host '': it must hold"),
    ],
)
def test_what_is_empty_opens_no_server(
    refusal: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    environ: dict[str, str],
    message: str,
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    monkeypatch.chdir(tmp_path)
    assert message in refusal(*arguments, environ=environ)


def test_a_port_in_use() -> None:
    with closing(bind_socket("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", "--port", str(port))
    assert result.exit_code == 2
    assert f"error: 127.0.0.1:{port} is already in use" in result.stderr


def test_an_error_in_json_where_the_log_is_json(refusal: Serve) -> None:
    (line,) = refusal("--log-format", "json", "--dtype", "int4").splitlines()
    fields = json.loads(line)
    assert (fields["level"], fields["logger"]) == ("error", "emberkv.serve")
    assert fields["message"].startswith("--dtype 'int4': use auto, float32, bfloat16 or float16")


def test_an_unknown_variable(refusal: Serve) -> None:
    printed = refusal(environ={"EMBERKV_CACHE_RAMM": "1GiB"})
    assert "error: unknown variable EMBERKV_CACHE_RAMM; did you mean 'EMBERKV_CACHE_RAM'?" in printed


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--cache-ram", "lots", "--cache-ram 'lots': use a size such as 4GiB"),
        ("--cache-ram", "0", "--cache-ram '0': use more than 0"),
        ("--dtype", "int4", "--dtype 'int4': use auto, float32, bfloat16 or float16"),
        ("--kernels", "cuda", "--kernels 'cuda': use auto, native or torch"),
        ("--generation-config", "vllm", "--generation-config 'vllm': use auto or ignore"),
        ("--eviction", "random", "--eviction 'random': use one of lru"),
        ("--block-size", "17", "--prefill-chunk 128: use a multiple of --block-size, which is 17"),
        ("--max-body", "big", "--max-body 'big': use a size such as 4GiB"),
    ],
)
def test_a_bad_setting(refusal: Serve, option: str, value: str, message: str) -> None:
    assert f"error: {message}" in refusal(option, value)


def test_a_pool_too_small_for_a_block(refusal: Serve, checkpoint: CheckpointFactory) -> None:
    printed = refusal(str(checkpoint("llama")), "--cache-ram", "1KiB")
    assert "error: a KV pool of 1024 bytes holds no block; one block of 16 tokens takes" in printed


def test_a_device_that_is_not_here(refusal: Serve, checkpoint: CheckpointFactory) -> None:
    assert "error: device is 'cuda:99'" in refusal(str(checkpoint("llama")), "--device", "cuda:99")


def test_a_folder_that_is_no_model(refusal: Serve, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    printed = refusal(str(empty))
    assert f"error: '{empty}' is no model" in printed


def test_a_folder_that_is_not_there(refusal: Serve, tmp_path: Path) -> None:
    assert f"error: no folder '{tmp_path / 'nowhere'}' exists" in refusal(str(tmp_path / "nowhere"))


def test_corrupt_weights(refusal: Serve, copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert f"error: {weights}" in refusal(str(copied))


def test_weights_of_another_shape(refusal: Serve, copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    assert "do not fit its config.json" in refusal(str(copied))


def test_a_model_that_cannot_be_served(refusal: Serve, checkpoint: CheckpointFactory) -> None:
    assert "error: mamba cannot be served: MambaBlock, MambaMixer keeps recurrent state of another kind" in refusal(
        str(checkpoint("mamba"))
    )


def test_brackets_in_a_message_are_printed_as_they_are(refusal: Serve, tmp_path: Path) -> None:
    assert "[bold]no[/]where" in refusal(str(tmp_path / "[bold]no[/]where"))


def test_the_port_is_free_again_after_a_refusal(tmp_path: Path) -> None:
    port = free_ports()
    result = run("serve", str(tmp_path), "--port", str(port))
    assert result.exit_code == 2
    with closing(bind_socket("127.0.0.1", port)):
        pass


def test_the_zoo_has_the_context_that_the_tests_of_the_server_count_on() -> None:
    assert CONTEXT == 4096
