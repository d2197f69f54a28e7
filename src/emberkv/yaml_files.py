"""YAML files: plain data of bounded size, in which each key of a mapping stands once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from emberkv.errors import EmberError

_MOST_CHARACTERS = 4 << 20
_TOO_LARGE = f"larger than {_MOST_CHARACTERS >> 20} MiB"


def read_yaml(
    path: Path, malformed: type[EmberError], unreadable: type[EmberError] | None = None, name: str = ""
) -> Any:
    """The data in a YAML file; None for an empty one.

    name: of the file in errors, by default its path. Raises ``malformed`` as `parse_yaml` does, and ``unreadable``
    (None: ``malformed``) for a file that cannot be read.
    """
    name = name or str(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise (unreadable or malformed)(f"{name} cannot be read: {error.strerror}") from error
    return parse_yaml(content, malformed, name)


def parse_yaml(content: bytes | str, malformed: type[EmberError], name: str = "it") -> Any:
    """The data in a YAML document; None for an empty one. name: of the document in errors.

    Raises ``malformed`` for what is not YAML, for a key that a mapping has twice, for values that no type can hold
    (a 13th month, a number of 5,000 digits), for nesting that is too deep to be read, and for more than 4 MiB, also
    where only aliases make it so large.
    """
    try:
        return _load(content)
    except yaml.YAMLError as error:
        raise malformed(f"{name} is not YAML: {' '.join(str(error).split())}") from error


def _load(content: bytes | str) -> Any:
    if len(content) > _MOST_CHARACTERS:
        raise yaml.YAMLError(f"it is {_TOO_LARGE}")
    try:
        return yaml.load(content, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except (ValueError, OverflowError) as error:
        raise yaml.YAMLError(str(error)) from error


class _Loader(yaml.SafeLoader):
    """YAML in which a mapping's second entry under one key is an error instead of the entry that counts."""

    def compose_document(self) -> yaml.Node | None:
        root: yaml.Node | None = super().compose_document()
        if root is not None:
            _measure(root, {}, set())
        return root

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        "in a mapping", node.start_mark, f"{key.value!r} is there twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _measure(node: yaml.Node, measured: dict[int, int], around: set[int]) -> int:
    """The characters that ``node`` has with all aliases written out; each node is measured once.

    measured: by the nodes' ids. around: the ids of those that ``node`` is within.
    """
    if id(node) in around:
        raise yaml.composer.ComposerError(None, None, "an alias refers to what it is within", node.start_mark)
    if id(node) not in measured:
        around.add(id(node))
        measured[id(node)] = 1 + sum(_measure(child, measured, around) for child in _children(node))
        measured[id(node)] += len(node.value) if isinstance(node, yaml.ScalarNode) else 0
        around.discard(id(node))
    if measured[id(node)] > _MOST_CHARACTERS:
        problem = f"with its aliases written out, it is {_TOO_LARGE}"
        raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
    return measured[id(node)]


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from (key, value)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value
