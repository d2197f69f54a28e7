"""Settings: defaults, then the environment, then the command line; an error names what is wrong."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from emberkv.config import NOT_SETTINGS, ServeConfig
from emberkv.core.policies.eviction import POLICY_NAMES
from emberkv.defaults import DEFAULT_PREFILL_CHUNK
from emberkv.errors import ConfigError
from emberkv.settings import option_name, read_settings, serve_config


def test_defaults() -> None:
    config = serve_config({}, {})
    assert config == ServeConfig()
    assert (config.host, config.port, config.cache_ram, config.model) == ("127.0.0.1", 8080, None, None)
    assert config.prefill_chunk == DEFAULT_PREFILL_CHUNK
    assert (config.exact, config.prefix_cache, config.api_keys) == (False, True, ())


def test_the_command_line_goes_before_the_environment() -> None:
    environ = {"EMBERKV_PORT": "9000", "EMBERKV_HOST": "0.0.0.0", "EMBERKV_EXACT": "true", "PATH": "/bin"}
    config = serve_config({"port": 7000, "host": None, "exact": None}, environ)
    assert (config.port, config.host, config.exact) == (7000, "0.0.0.0", True)


def test_what_the_command_line_switches_off_is_off() -> None:
    config = serve_config({"prefix_cache": False, "exact": False}, {"EMBERKV_PREFIX_CACHE": "1", "EMBERKV_EXACT": "1"})
    assert (config.prefix_cache, config.exact) == (False, False)


@pytest.mark.parametrize(
    ("variable", "text", "name", "expected"),
    [
        ("EMBERKV_CACHE_RAM", "4GiB", "cache_ram", 4 * 2**30),
        ("EMBERKV_CACHE_RAM", "1.5 gb", "cache_ram", 1_500_000_000),
        ("EMBERKV_MAX_BODY", "2000", "max_body", 2000),
        ("EMBERKV_API_KEYS", "one, two,,", "api_keys", (SecretStr("one"), SecretStr("two"))),
        ("EMBERKV_PREFIX_CACHE", "off", "prefix_cache", False),
        ("EMBERKV_MACHINE_CACHE", "/tmp/x", "machine_cache", Path("/tmp/x")),  # noqa: S108 - only a name
        ("EMBERKV_DRAIN_SECONDS", "0", "drain_seconds", 0.0),
        ("EMBERKV_REQUEST_TIMEOUT", "90", "request_timeout", 90.0),
        ("EMBERKV_MODEL", "someone/model", "model", "someone/model"),
    ],
)
def test_variables(variable: str, text: str, name: str, expected: object) -> None:
    assert getattr(serve_config({}, {variable: text}), name) == expected


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (True, 60.0, (), None)),
        ({"KV_CACHE_WARMUP": "", "WARMUP_TIMEOUT_SEC": "", "WARMUP_SYSTEM_FILE": ""}, (True, 60.0, (), None)),
        ({"KV_CACHE_WARMUP": "1", "WARMUP_TIMEOUT_SEC": "1"}, (True, 1.0, (), None)),
        ({"KV_CACHE_WARMUP": "off", "WARMUP_TIMEOUT_SEC": "300"}, (False, 300.0, (), None)),
        ({"WARMUP_TIMEOUT_SEC": "2.5", "WARMUP_SYSTEM_FILE": "/a,b/c.txt"}, (True, 2.5, (), Path("/a,b/c.txt"))),
        ({"WARMUP_SYSTEM_FILE": "~/c.txt"}, (True, 60.0, (), Path("~/c.txt").expanduser())),
        ({"EMBERKV_WARMUP_SYSTEM_FILES": "a.txt, b.txt"}, (True, 60.0, (Path("a.txt"), Path("b.txt")), None)),
        ({"KV_CACHE_WARMUP": "0", "EMBERKV_WARMUP": "1"}, (True, 60.0, (), None)),
    ],
)
def test_warmup_variables(
    environ: dict[str, str],
    expected: tuple[bool, float, tuple[Path, ...], Path | None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = serve_config({}, environ)
    files = config.warmup_system_files, config.warmup_fallback_file
    assert (config.warmup, config.warmup_timeout, *files) == expected
    assert not config.warmup_required
    assert not caplog.messages


@pytest.mark.parametrize("text", ["0", "0.99", "300.5", "-5", "1e9", "nan", "inf", "soon", "60s"])
def test_a_useless_timeout_in_the_variable_warns_and_is_60(text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert serve_config({}, {"WARMUP_TIMEOUT_SEC": text}).warmup_timeout == 60.0
    assert caplog.messages == [f"WARMUP_TIMEOUT_SEC is {text}; it must be from 1 to 300 seconds, so 60 is used"]


@pytest.mark.parametrize("text", ["0", "0.99", "300.5", "-5", "9999"])
def test_a_timeout_out_of_bounds_warns_and_is_60(text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert serve_config({"warmup_timeout": text}, {}).warmup_timeout == 60.0
    assert caplog.messages == [f"--warmup-timeout is {float(text)}; it must be from 1 to 300 seconds, so 60 is used"]


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "soon", "60s", ""])
def test_a_timeout_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"warmup.timeout"):
        serve_config({"warmup_timeout": text}, {})


@pytest.mark.parametrize("text", ["2", "maybe", "-1"])
def test_a_useless_switch_in_the_variable_warns_and_is_ignored(text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert serve_config({}, {"KV_CACHE_WARMUP": text}).warmup is True
    assert caplog.messages == [f"KV_CACHE_WARMUP is {text!r}; it must be 0 or 1, so it is ignored"]


def test_no_variable_of_ours_sets_the_fallback_file() -> None:
    with pytest.raises(ConfigError, match="unknown variable EMBERKV_WARMUP_FALLBACK_FILE"):
        serve_config({}, {"EMBERKV_WARMUP_FALLBACK_FILE": "x"})


def test_warmup_settings_of_the_command_line_go_first() -> None:
    given = {"warmup": False, "warmup_timeout": "7", "warmup_system_files": ["x.txt"]}
    environ = {"KV_CACHE_WARMUP": "1", "WARMUP_TIMEOUT_SEC": "9", "WARMUP_SYSTEM_FILE": "y.txt"}
    config = serve_config(given, environ)
    assert (config.warmup, config.warmup_timeout, config.warmup_system_files) == (False, 7.0, (Path("x.txt"),))


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_every_eviction_policy_is_accepted(policy: str) -> None:
    assert serve_config({"eviction": policy}, {}).eviction == policy


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"port": 70000}, "--port 70000: use at most 65535"),
        ({"port": "http"}, "--port 'http': use a whole number"),
        ({"cache_ram": "much"}, "--cache-ram 'much': use a size such as 4GiB"),
        ({"cache_ram": "0"}, "--cache-ram '0': use more than 0"),
        ({"cache_ram": "-1GiB"}, "--cache-ram '-1GiB': use a size such as 4GiB"),
        ({"dtype": "int8"}, "--dtype 'int8': use auto, float32, bfloat16 or float16"),
        ({"eviction": "random"}, "--eviction 'random': use one of lru"),
        ({"block_size": 0}, "--block-size 0: use at least 1"),
        ({"prefill_chunk": 100}, "--prefill-chunk 100: use a multiple of --block-size, which is 16"),
        (
            {"max_running": 0, "max_step_tokens": 0},
            "--max-step-tokens 0: use at least 1; --max-running 0: use at least 1",
        ),
        ({"log_level": "loud"}, "--log-level 'loud': use debug, info, warning or error"),
        ({"warmup": "maybe"}, "--warmup 'maybe': use true or false"),
        ({"remote_tier_ttl": 5}, "--remote-tier-ttl is given without --remote-tier; give its URL, too"),
        ({"remote_tier": "http://h"}, "--remote-tier: use a URL such as redis://HOST:6379"),
        ({"remote_tier": "redis://h:x"}, "--remote-tier: use a port from 0 to 65535 in the URL"),
        ({"cache_disk": "10GiB"}, "--cache-disk is given without --cache-dir"),
        ({"record_trace": "a", "trace_unit": 3}, "--trace-unit 3: use a divisor of --block-size, which is 16"),
        ({"trace_unit": 1}, "--trace-unit is given without --record-trace"),
        ({"cache_dir": "/x", "cache_disk": "0"}, "--cache-disk '0': use more than 0"),
        ({"admin_key": "a", "admin_key_file": "b"}, "--admin-key and --admin-key-file are both given"),
        ({"ram_tier": "-1GiB"}, "--ram-tier '-1GiB': use a size such as 4GiB"),
        ({"cache_ram": "9" * 400 + "EiB"}, "9999[.]{3}': use a size such as 4GiB"),
        ({"cache_ram": "2EiB"}, "--cache-ram '2EiB': use a size of at most 1EiB"),
        ({"drain_seconds": "inf"}, "--drain-seconds 'inf': use a finite number"),
        ({"drain_seconds": "nan"}, "--drain-seconds 'nan': use a finite number"),
        ({"port": "9" * 5000}, "use a number with fewer digits"),
        ({"cache_dir": ""}, "--cache-dir '': use a path that is not empty"),
        ({"cache_dir": "~nobody-of-this-name/x"}, "use a path without '~'"),
        ({"served_names": [""]}, "--served-name '': it must hold visible characters"),
        ({"served_names": ["a\x1b[31m"]}, "--served-name .*no control characters"),
        ({"model": ""}, "model '': it must hold visible characters"),
        ({"nonsense": 1}, "--nonsense 1: it is unknown"),
    ],
)
def test_a_bad_value_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?i){message}"):
        serve_config(given, {})


@pytest.mark.parametrize("text", ["", " , ", ","])
def test_keys_that_did_not_arrive_do_not_open_the_server(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^EMBERKV_API_KEYS is set to nothing; give a value, or do not set it$"):
        serve_config({}, {"EMBERKV_API_KEYS": text})


@pytest.mark.parametrize("name", sorted(ServeConfig.model_fields.keys() - set(NOT_SETTINGS)))
def test_no_variable_may_be_empty(name: str) -> None:
    variable = f"EMBERKV_{name.upper()}"
    with pytest.raises(ConfigError, match=f"^{variable} is set to nothing"):
        serve_config({}, {variable: ""})


@pytest.mark.parametrize("key", ["", " k ", "k\n", "a\0b"])
@pytest.mark.parametrize("name", ["api_keys", "admin_key", "metrics_key"])
def test_a_key_that_no_client_can_send_is_refused_and_not_repeated(name: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{option_name(name)}: the key (is empty|begins or ends)") as refused:
        serve_config({name: [key] if name == "api_keys" else key}, {})
    assert repr(key)[1:-1] not in str(refused.value) or not key


@pytest.mark.parametrize("name", ["host", "model"])
def test_an_empty_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{option_name(name)} '': it must hold visible characters"):
        serve_config({name: ""}, {})


def test_a_bad_variable_is_named_by_its_setting() -> None:
    with pytest.raises(ConfigError, match="EMBERKV_PORT 'eighty': use a whole number"):
        serve_config({}, {"EMBERKV_PORT": "eighty"})


def test_unknown_variables_are_named_with_what_was_meant() -> None:
    environ = {"EMBERKV_PORTS": "1", "EMBERKV_CACHE_RAN": "4GiB", "EMBERKV_PORT": "8080"}
    with pytest.raises(
        ConfigError, match=r"unknown variable EMBERKV_CACHE_RAN; did you mean 'EMBERKV_CACHE_RAM'\?, EMBERKV_PORTS; did"
    ):
        serve_config({}, environ)


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ServeConfig().port = 1


def test_tiers_are_off_without_a_size_or_a_folder() -> None:
    config = serve_config({}, {})
    assert (config.cache_dir, config.cache_disk, config.ram_tier) == (None, 50 * 2**30, 0)
    config = serve_config({"ram_tier": "2GiB"}, {"EMBERKV_CACHE_DIR": "/blocks", "EMBERKV_CACHE_DISK": "1GiB"})
    assert (config.cache_dir, config.cache_disk, config.ram_tier) == (Path("/blocks"), 2**30, 2**31)


@pytest.mark.parametrize("url", ["redis://:geheim@host", "redis://host?password=geheim", "geheim"])
def test_a_password_in_the_remote_tier_s_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^--remote-tier: use a URL") as raised:
        serve_config({"remote_tier": url}, {})
    assert "geheim" not in str(raised.value)


def test_the_remote_tier_s_password_comes_from_the_environment_or_a_file_and_is_not_shown() -> None:
    given = {"remote_tier": "redis://user@host:7/1"}
    settings = read_settings(given, {"EMBERKV_REMOTE_TIER_PASSWORD": "geheim"})
    assert "geheim" not in settings.as_yaml() + repr(settings)
    assert "remote-tier: redis://user@host:7/1  # --remote-tier\n" in settings.as_yaml()
    with pytest.raises(ConfigError, match="_PASSWORD and --remote-tier-password-file are both given"):
        read_settings({**given, "remote_tier_password_file": "f"}, {"EMBERKV_REMOTE_TIER_PASSWORD": "geheim"})


def test_a_secret_is_never_repeated() -> None:
    with pytest.raises(ConfigError, match=r"^EMBERKV_SECRET: it must have at least 16 characters") as raised:
        serve_config({}, {"EMBERKV_SECRET": "too short"})
    assert "too short" not in str(raised.value)
    config = serve_config({}, {"EMBERKV_SECRET": "long enough to be one"})
    assert config.secret is not None
    assert config.secret.get_secret_value() == "long enough to be one"
    assert "long enough" not in repr(config)


@pytest.mark.parametrize("origin", ["*", "https://chat.example", "http://localhost:3000"])
def test_origins(origin: str) -> None:
    assert serve_config({"cors_origins": [origin]}, {}).cors_origins == (origin,)
    assert serve_config({}, {"EMBERKV_CORS_ORIGINS": f"{origin}, http://b"}).cors_origins == (origin, "http://b")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cors_origins": ["https://chat.example/"]}, "without a path"),
        ({"cors_origins": ["chat.example"]}, "an origin is like https://example.com"),
        ({"root_path": "llm"}, "begin with a slash"),
        ({"root_path": "/llm/"}, "not end with one"),
        ({"tls_cert": "cert.pem"}, "go together"),
    ],
)
def test_settings_of_the_http_server_that_cannot_be(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        serve_config(given, {})
