"""A server's settings from four places, and how each is named."""

from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from emberkv.cli.main import app
from emberkv.config import NOT_SETTINGS, ServeConfig
from emberkv.errors import ConfigError
from emberkv.settings import option_name, read_settings, serve_config

NAMES = sorted(ServeConfig.model_fields.keys() - set(NOT_SETTINGS))

KUBERNETES = {
    "EMBERKV_SERVICE_HOST": "10.96.0.12",
    "EMBERKV_SERVICE_PORT": "8080",
    "EMBERKV_SERVICE_PORT_HTTP": "8080",
    "EMBERKV_PORT": "tcp://10.96.0.12:8080",
    "EMBERKV_PORT_8080_TCP": "tcp://10.96.0.12:8080",
    "EMBERKV_PORT_8080_TCP_PROTO": "tcp",
    "EMBERKV_PORT_8080_TCP_PORT": "8080",
    "EMBERKV_PORT_8080_TCP_ADDR": "10.96.0.12",
    "EMBERKV_METRICS_SERVICE_HOST": "10.96.0.13",
    "EMBERKV_METRICS_PORT": "udp://10.96.0.13:9090",
}


def written(folder: Path, text: str, name: str = "serve.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_named_as_its_option_is_typed(name: str) -> None:
    group: Any = typer.main.get_command(app)
    serve = group.commands["serve"]
    options = {option for param in serve.params for option in (*param.opts, param.name)}
    named = option_name(name)
    assert named in options or named == f"EMBERKV_{name.upper()}"


def test_options_go_before_variables_and_these_before_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "port: 1\nhost: file\nserved-name: file\nblock_size: 8\n")
    settings = read_settings({"port": 3}, {"EMBERKV_PORT": "2", "EMBERKV_HOST": "variable"}, file)
    config = settings.config
    assert (config.port, config.host, config.served_names, config.block_size) == (3, "variable", ("file",), 8)
    assert config.dtype == "auto"
    assert settings.sources == {
        "port": "--port",
        "host": "EMBERKV_HOST",
        "served_names": f"{file}: served-name",
        "block_size": f"{file}: block_size",
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "cache-ram: 4GiB\napi-key: [one, two]\nwarmup: no\ndrain-seconds: 2.5\nwarmup-system-file: a.txt\n"),
        ("a.toml", 'cache-ram = "4GiB"\napi-key = ["one", "two"]\nwarmup = false\ndrain-seconds = 2.5\n'
                   'warmup-system-file = "a.txt"\n'),
    ],
)  # fmt: skip
def test_yaml_and_toml_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    config = serve_config({}, {}, written(tmp_path, text, name))
    assert [key.get_secret_value() for key in config.api_keys] == ["one", "two"]
    assert (config.cache_ram, config.warmup, config.drain_seconds) == (2**32, False, 2.5)
    assert config.warmup_system_files == (Path("a.txt"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cache-ran: 4GiB", "'cache-ran' is no setting; did you mean 'cache-ram'?"),
        ("secret: abcdefghijklmnopqrst", "'secret' is no setting"),
        ("cache-ram: lots", "cache-ram 'lots': use a size such as 4GiB"),
        ("port: true", "port: use text (in quotes) or a number"),
        ("port: [1]", "port: use text (in quotes) or a number"),
        ("warmup: 1", "warmup: use true or false"),
        ("served-name: 7", "served-name 7: use text, in quotes if it looks like a number"),
        ("port: 1\nport: 2", "is not YAML"),
        ("port: 2024-13-45", "is not YAML: month must be in 1..12"),
        ("[" * 5000, "is not YAML: it is nested too deeply"),
        ("port", "has no settings; write one a line, such as 'cache-ram: 4GiB'"),
        ("port: {a: b}", "port: use text (in quotes) or a number"),
        ("cache-dir: \"a\\0b\"", "use a path that is not empty and has no NUL character"),
        ("x" * (2**20 + 1), "has more than 1,048,576 bytes"),
        ("\x00", "is not YAML"),
    ],
)  # fmt: skip
def test_a_file_at_fault_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        read_settings({}, {}, file)
    assert str(file) in str(refused.value)
    assert message in str(refused.value)


def test_a_file_that_is_not_there_or_a_folder_is_named(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=f"{path} cannot be read: {reason}"):
            read_settings({}, {}, path)


def test_a_key_in_a_file_is_not_repeated(tmp_path: Path) -> None:
    file = written(tmp_path, "api-key: ' secret-key '")
    with pytest.raises(ConfigError, match="api-key: the key begins or ends with a blank") as refused:
        read_settings({}, {}, file)
    assert "secret-key" not in str(refused.value)


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert serve_config({}, {}, written(tmp_path, "# nothing\n")) == ServeConfig()


def test_a_kubernetes_service_called_emberkv_sets_nothing() -> None:
    assert serve_config({}, KUBERNETES) == ServeConfig()


@pytest.mark.parametrize("name", NAMES)
def test_no_setting_is_taken_for_kubernetes(name: str) -> None:
    with pytest.raises(ConfigError, match=f"EMBERKV_{name.upper()} is set to nothing"):
        read_settings({}, {f"EMBERKV_{name.upper()}": ""})


def test_a_port_that_is_no_service_is_still_refused() -> None:
    with pytest.raises(ConfigError, match="EMBERKV_PORT 'http://x': use a whole number"):
        serve_config({}, {"EMBERKV_PORT": "http://x"})


def test_variables_of_client_commands_are_no_settings() -> None:
    assert serve_config({}, {"EMBERKV_URL": "http://x", "EMBERKV_CONFIG": "y"}) == ServeConfig()


def test_print_config_gives_a_file_with_the_same_settings_and_no_keys(tmp_path: Path) -> None:
    environ = {"EMBERKV_ADMIN_KEY": "hush-hush", "EMBERKV_SECRET": "s" * 20, "EMBERKV_CACHE_DISK": "3GiB"}
    arguments = ["serve", "m: odd", "--cache-dir", "~/a", "--warmup-system-file", "b.txt", "--print-config"]
    result = CliRunner().invoke(app, arguments, env=environ)
    assert result.exit_code == 0
    assert "cache-disk: 3GiB  # EMBERKV_CACHE_DISK" in result.stdout.splitlines()
    assert "# port: 8080  # default" in result.stdout.splitlines()
    assert "# admin-key: given  # EMBERKV_ADMIN_KEY" in result.stdout.splitlines()
    assert not {"hush-hush", "s" * 20} & set(result.stdout.split())
    assert set(yaml.safe_load(result.stdout)) == {"model", "cache-dir", "cache-disk", "warmup-system-file"}
    again = serve_config({}, {}, written(tmp_path, result.stdout))
    expected = {"model": "m: odd", "cache_dir": "~/a", "cache_disk": "3GiB", "warmup_system_files": ["b.txt"]}
    assert again == serve_config(expected, {})
    assert again.cache_dir == Path.home() / "a"


def test_the_file_can_be_named_by_a_variable(tmp_path: Path) -> None:
    file = written(tmp_path, "port: 99999")
    result = CliRunner().invoke(app, ["serve"], env={"EMBERKV_CONFIG": str(file)})
    assert result.exit_code == 2
    assert f"error: {file}: port 99999: use at most 65535" in result.stderr
