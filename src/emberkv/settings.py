"""The settings of a server: command line before environment, before configuration file, before defaults."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_origin

import yaml
from pydantic import ByteSize, ValidationError

from emberkv.config import NOT_SETTINGS, ServeConfig
from emberkv.defaults import usable_warmup_seconds, warmup_variables
from emberkv.errors import ConfigError
from emberkv.validation import in_plain_words, shown, suggestion
from emberkv.yaml_files import parse_yaml

ENV_PREFIX = "EMBERKV_"
OTHER_VARIABLES = frozenset({"EMBERKV_URL", "EMBERKV_CONFIG"})
"""Variables with the prefix that are no settings of a server: what client commands ask, and the configuration file."""

_KUBERNETES = re.compile(
    r"EMBERKV_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
"""What Kubernetes sets in every pod of a namespace for Services called ``emberkv`` and ``emberkv-...``."""

_KUBERNETES_PORT = re.compile(r"EMBERKV_(\w+_)?PORT=(tcp|udp|sctp)://.*")
_ENVIRONMENT_ONLY = frozenset({"secret", "machine_cache", "remote_tier_password", "cluster_secret"})
_NOT_REPEATED = frozenset({"remote_tier"})
"""What may hold a password where it is not what it should be."""

_MOST_FILE_BYTES = 2**20
_UNITS = ("EiB", "PiB", "TiB", "GiB", "MiB", "KiB")

_NAMES = [name for name in ServeConfig.model_fields if name not in NOT_SETTINGS]


class SourcedValue(NamedTuple):
    """A value as it was given, and where: ``--port``, ``EMBERKV_PORT`` or ``serve.yaml: port``."""

    value: Any
    where: str


@dataclass(frozen=True)
class Settings:
    """The effective configuration, and where each setting that is not a default was given."""

    config: ServeConfig
    sources: Mapping[str, str]

    def as_yaml(self) -> str:
        """A configuration file that gives the same settings, each with its source. Defaults are comments; so are what
        only the environment can give, and keys, of which nothing is shown.
        """
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        for name in _NAMES:
            source, value = self.sources.get(name), getattr(self.config, name)
            text = ("given" if value else "not given") if _is_secret(name) else _yaml_value(value)
            hidden = source is None or _is_secret(name) or name in _ENVIRONMENT_ONLY
            key = option_name(name).removeprefix("--")
            yield f"{'# ' if hidden else ''}{key}: {text}  # {source or 'default'}"


def option_name(name: str) -> str:
    """A field of `ServeConfig` as users write it: ``--cache-ram``, ``--api-key``, ``model``, ``EMBERKV_SECRET``."""
    if name in _ENVIRONMENT_ONLY:
        return f"{ENV_PREFIX}{name.upper()}"
    singular = name.removesuffix("s") if _is_list(name) else name
    return singular if name == "model" else f"--{singular.replace('_', '-')}"


def serve_config(given: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None) -> ServeConfig:
    """The configuration alone; see `read_settings`."""
    return read_settings(given, environ, file).config


def read_settings(given: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None) -> Settings:
    """Merge what the command line ``given`` (None: not given) with ``EMBERKV_*`` variables and a configuration file.

    ``EMBERKV_API_KEYS`` and other variables of lists hold entries separated by commas. The variables of
    `WarmupVariables` count where nothing else is given. Raises ConfigError that names each option, variable or key of
    the file at fault as it was written.
    """
    settings = {
        **({} if file is None else _from_file(file)),
        **_from_environment(environ),
        **{name: SourcedValue(value, option_name(name)) for name, value in given.items() if value is not None},
    }
    others = warmup_variables(environ)
    if others.enabled is not None:
        settings.setdefault("warmup", SourcedValue(others.enabled, "KV_CACHE_WARMUP"))
    if others.timeout is not None:
        settings.setdefault("warmup_timeout", SourcedValue(others.timeout, "WARMUP_TIMEOUT_SEC"))
    if others.system_file is not None:
        settings["warmup_fallback_file"] = SourcedValue(others.system_file, "WARMUP_SYSTEM_FILE")
    try:
        config = ServeConfig.model_validate({name: each.value for name, each in settings.items()})
    except ValidationError as error:
        raise ConfigError("; ".join(_complaint(detail, settings) for detail in error.errors())) from error
    name = settings["warmup_timeout"].where if "warmup_timeout" in settings else ""
    config = config.model_copy(update={"warmup_timeout": usable_warmup_seconds(name, config.warmup_timeout)})
    return Settings(config, {name: each.where for name, each in settings.items()})


def _from_environment(environ: Mapping[str, str]) -> dict[str, SourcedValue]:
    found, unknown, empty = {}, [], []
    for variable, text in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable in OTHER_VARIABLES or _is_of_kubernetes(variable, text):
            continue
        name = variable.removeprefix(ENV_PREFIX).lower()
        if name not in _NAMES or variable != f"{ENV_PREFIX}{name.upper()}":
            unknown.append(variable)
            continue
        value = [each.strip() for each in text.split(",") if each.strip()] if _is_list(name) else text
        if not value:
            empty.append(variable)
        found[name] = SourcedValue(value, variable)
    if empty:  # a secret that did not reach the server must not open it
        raise ConfigError(f"{', '.join(sorted(empty))} is set to nothing; give a value, or do not set it")
    if unknown:
        known = [f"{ENV_PREFIX}{name.upper()}" for name in _NAMES]
        named = ", ".join(f"{variable}{suggestion(variable, known)}" for variable in sorted(unknown))
        raise ConfigError(f"unknown variable {named}; 'emberkv serve --help' lists the options")
    return found


def _is_of_kubernetes(variable: str, text: str) -> bool:
    return bool(_KUBERNETES.fullmatch(variable) or _KUBERNETES_PORT.fullmatch(f"{variable}={text}"))


def _from_file(path: Path) -> dict[str, SourcedValue]:
    data = _read(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path} has no settings; write one a line, such as 'cache-ram: 4GiB'")
    names = {option_name(name).removeprefix("--"): name for name in _NAMES if name not in _ENVIRONMENT_ONLY}
    found = {}
    for key, value in data.items():
        name = names.get(str(key).replace("_", "-"))
        if name is None:
            raise ConfigError(f"{path}: {key!r} is no setting{suggestion(str(key), names)}")
        if value is not None:
            found[name] = _given_in_file(name, value, f"{path}: {key}")
    return found


def _given_in_file(name: str, value: Any, where: str) -> SourcedValue:
    values = (value if isinstance(value, list) else [value]) if _is_list(name) else value
    flag = ServeConfig.model_fields[name].annotation is bool
    for each in values if isinstance(values, list) and _is_list(name) else [values]:
        if not isinstance(each, (str, int, float)) or isinstance(each, bool) is not flag:
            kind = "true or false" if flag else "text (in quotes) or a number"
            raise ConfigError(f"{where}: use {kind}")
    return SourcedValue(values, where)


def _read(path: Path) -> Any:
    """The file's data: TOML where its name ends so, else YAML. Raises ConfigError that names the file."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_FILE_BYTES + 1)
        if len(content) > _MOST_FILE_BYTES:
            raise ConfigError(f"{path} has more than {_MOST_FILE_BYTES:,} bytes; a configuration file has fewer")
        if path.suffix == ".toml":
            return tomllib.loads(content.decode("utf-8"))
        data = parse_yaml(content, ConfigError, f"the configuration file {path}")
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"the configuration file {path} cannot be read: {reason}") from error
    return {} if data is None else data


def _complaint(detail: Any, settings: Mapping[str, SourcedValue]) -> str:
    """A value at fault, named as it was given; what a secret holds is not repeated."""
    words = in_plain_words(detail)
    if not detail["loc"]:
        return words
    name = str(detail["loc"][0])
    where = settings[name].where if name in settings else name
    hidden = _is_secret(name) or name in _NOT_REPEATED
    return f"{where}: {words}" if hidden else f"{where} {shown(detail['input'])}: {words}"


def _is_list(name: str) -> bool:
    field = ServeConfig.model_fields.get(name)
    return field is not None and get_origin(field.annotation) is tuple


def _is_secret(name: str) -> bool:
    field = ServeConfig.model_fields.get(name)
    return field is not None and "SecretStr" in str(field.annotation)


def _yaml_value(value: Any) -> str:
    if isinstance(value, ByteSize):
        for power, unit in zip(range(60, 0, -10), _UNITS, strict=True):
            if value and value % 2**power == 0:
                return f"{value >> power}{unit}"
        return str(int(value))
    plain = [str(each) for each in value] if isinstance(value, tuple) else value
    plain = str(plain) if isinstance(plain, Path) else plain
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")
