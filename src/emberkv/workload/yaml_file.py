"""YAML files, read whole."""

from pathlib import Path
from typing import Any

import yaml

from emberkv.errors import EmberError, WorkloadError
from emberkv.yaml_loader import load_yaml


def parse_yaml(text: str | bytes, malformed: type[EmberError], source: str = "") -> Any:
    """Plain data. Raises ``malformed``, beginning with ``source`` (a file's name), if it is not YAML."""
    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        begin = f"{source}: " if source else ""
        raise malformed(f"{begin}not YAML: {' '.join(str(error).split())}") from error


def read_yaml(path: Path, malformed: type[EmberError]) -> Any:
    """Raises WorkloadError if the file cannot be read, and ``malformed`` if it is not YAML; both name it."""
    try:
        return parse_yaml(path.read_bytes(), malformed, str(path))
    except OSError as error:
        raise WorkloadError(f"cannot read {path}: {error.strerror}") from error
