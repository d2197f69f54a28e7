"""YAML files, read whole."""

from pathlib import Path
from typing import Any

import yaml

from emberkv.errors import EmberError, WorkloadError


def read_yaml(path: Path, malformed: type[EmberError]) -> Any:
    """Raises WorkloadError if the file cannot be read, and ``malformed`` if it is not YAML; both name it."""
    try:
        return yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise WorkloadError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise malformed(f"{path}: not YAML: {' '.join(str(error).split())}") from error
