"""YAML files, read whole."""

from pathlib import Path
from typing import Any

import yaml

from emberkv.errors import EmberError, WorkloadError


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which PyYAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str | bytes, malformed: type[EmberError], source: str = "") -> Any:
    """Plain data. Raises ``malformed``, beginning with ``source`` (a file's name), if it is not YAML."""
    begin = f"{source}: " if source else ""
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise malformed(f"{begin}not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise malformed(f"{begin}not YAML of a kind that is read: it is nested too deep") from error


def read_yaml(path: Path, malformed: type[EmberError]) -> Any:
    """Raises WorkloadError if the file cannot be read, and ``malformed`` if it is not YAML; both name it."""
    try:
        return parse_yaml(path.read_bytes(), malformed, str(path))
    except OSError as error:
        raise WorkloadError(f"cannot read {path}: {error.strerror}") from error
