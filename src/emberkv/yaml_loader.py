"""YAML as emberkv's files are read: plain data, each key once, and every fault a `yaml.YAMLError`."""

from typing import Any

import yaml


def load_yaml(content: bytes | str) -> Any:
    """The data in a YAML document; None for an empty one.

    Raises yaml.YAMLError for what is not YAML, for a key that a mapping has twice, for values that no type can hold
    (a 13th month, a number of 5,000 digits) and for nesting that is too deep to be read.
    """
    try:
        return yaml.load(content, Loader=_UniqueKeys)  # noqa: S506 - a SafeLoader
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except (ValueError, OverflowError) as error:
        raise yaml.YAMLError(str(error)) from error


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a mapping's second entry under one key is an error instead of the entry that counts."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    "in a mapping", node.start_mark, f"{key!r} is there twice", node.value[index][0].start_mark
                )
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping
