"""A model's generation_config.json: the sampling that its makers advise, and what ends an answer."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from emberkv.engine.request import SamplingParams
from emberkv.engine.torch.model.checkpoint import read_json
from emberkv.errors import CorruptModelError, RequestError

_log = logging.getLogger(__name__)

FILE_NAME = "generation_config.json"

GenerationConfigMode = Literal["auto", "ignore"]

_SAMPLING_FIELDS: dict[str, type] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
}


def read_generation_config(folder: Path, mode: GenerationConfigMode) -> dict[str, Any]:
    """What the file in ``folder`` holds; nothing where there is none.

    Raises CorruptModelError for a file that holds no JSON object. With ``mode`` "ignore", that is logged only.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except CorruptModelError as error:
        if mode == "auto":
            raise CorruptModelError(
                f"{error}; mend it, or give --generation-config ignore, which keeps the end tokens of config.json "
                "and of the tokenizer"
            ) from error
        _log.warning("%s; it is ignored, with the end tokens that it may name", error)
        return {}


def sampling_defaults(content: Mapping[str, Any]) -> SamplingParams:
    """What ``content`` sets, for requests that do not set it. ``do_sample`` is not looked at.

    A value of no use is logged and left out.
    """
    defaults: dict[str, Any] = {}
    for name, kind in _SAMPLING_FIELDS.items():
        value = content.get(name)
        if value is None:
            continue
        problem = _problem(name, value, kind)
        if problem is None:
            defaults[name] = value
        else:
            _log.warning("%s of the model: %s; it is ignored", FILE_NAME, problem)
    if defaults:
        shown = ", ".join(f"{name} {value:g}" for name, value in defaults.items())
        _log.info(
            "requests that do not say otherwise are sampled as the model's %s advises: %s (--generation-config ignore "
            "turns that off)",
            FILE_NAME,
            shown,
        )
    return SamplingParams(**defaults)


def end_tokens(declared: Iterable[object]) -> frozenset[int]:
    """All token ids in ``declared``, each of whose entries is the value of an eos_token_id: an id, a list or None.

    Raises CorruptModelError for anything else.
    """
    ids: set[int] = set()
    for value in declared:
        for each in value if isinstance(value, list) else [value]:
            if each is None:
                continue
            if type(each) is not int or each < 0:
                raise CorruptModelError(f"eos_token_id is {value!r}; it must be a token id, or a list of them")
            ids.add(each)
    return frozenset(ids)


def _problem(name: str, value: Any, kind: type) -> str | None:
    accepted = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted):
        return f"{name} is {value!r}; it must be {'an integer' if kind is int else 'a number'}"
    fields: dict[str, Any] = {name: value}
    try:
        SamplingParams(**fields)
    except RequestError as error:
        return str(error)
    return None
