"""Writes docs/api.md from the signatures and docstrings of the public Python API.

python -m scripts.api_page
"""

import dataclasses
import doctest
import enum
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs/api.md"

INTRODUCTION = """\
# Python API

Importing `emberkv` loads nothing heavy; each name brings what it needs when it is first used. `pip install
'.[torch]'` is needed for what computes, the plain package for the rest. Every error is a subclass of
`emberkv.errors.EmberError`. This page is generated from the docstrings by `python -m scripts.api_page`.
"""

SECTIONS = {
    "Generate in your own process": (
        "emberkv.LLM", "emberkv.llm.CompletionStream", "emberkv.llm.Completion", "emberkv.SamplingParams",
        "emberkv.engine.request.CacheUsage", "emberkv.engine.request.EngineStats",
    ),
    "Ask why a prompt missed": (
        "emberkv.core.explaining.explanation.Explanation", "emberkv.core.explaining.explanation.Miss",
        "emberkv.core.explaining.explanation.MissReason", "emberkv.core.explaining.explanation.Divergence",
    ),
    "Predict": ("emberkv.simulate", "emberkv.plan", "emberkv.sim.run.Results", "emberkv.sim.plan.Plan"),
    "Keep bytes in RAM": ("emberkv.InMemoryKVCacheManager",),
    "Warm a cache": ("emberkv.warmup_kv_cache", "emberkv.get_standard_system_prompt"),
    "Errors": ("emberkv.errors",),
}  # fmt: skip
"""What the page shows, in order; a module stands for its exceptions."""


def page() -> str:
    """The whole page, as Markdown."""
    parts = [INTRODUCTION]
    for title, names in SECTIONS.items():
        parts.append(f"## {title}\n")
        for name in names:
            parts += _entries(name)
    return "\n".join(parts)


def _found(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    parent = import_module(module)
    return getattr(parent, attribute) if hasattr(parent, attribute) else import_module(name)


def _entries(name: str) -> Iterator[str]:
    found, short = _found(name), name.rpartition(".")[2]
    if inspect.ismodule(found):
        yield _exceptions(found)
        return
    yield f"### `{name}`\n"
    yield _documented(short, found)
    if inspect.isclass(found) and not issubclass(found, enum.Enum):
        for method, value in vars(found).items():
            if not method.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                yield _documented(f"{short}.{method}", value)


def _documented(name: str, found: Any) -> str:
    lines = [f"```python\n{_signature(name, found)}\n```\n"]
    text = inspect.getdoc(found)
    if text:
        lines.append(_markdown(text))
    if inspect.isclass(found) and issubclass(found, enum.Enum):
        lines.append("\n".join(f"- `{each.name}`: `{each.value!r}`" for each in found) + "\n")
    return "\n".join(lines)


def _signature(name: str, found: Any) -> str:
    if isinstance(found, property):
        return f"{name}: {_type_name(inspect.signature(found.fget).return_annotation)}"  # type: ignore[arg-type]
    if inspect.isclass(found) and issubclass(found, enum.Enum):
        return f"class {name}(Enum)"
    if dataclasses.is_dataclass(found) and inspect.isclass(found):
        fields = (f"    {field.name}: {_type_name(field.type)}{_default(field)}" for field in dataclasses.fields(found))
        return f"class {name}:\n" + "\n".join(fields)
    signature = inspect.signature(found)
    returned = signature.return_annotation
    shown = [each.replace(annotation=each.empty) for each in signature.parameters.values() if each.name != "self"]
    call = name + str(signature.replace(parameters=shown, return_annotation=signature.empty))
    if not inspect.isclass(found) and returned is not signature.empty:
        call += f" -> {_type_name(returned)}"
    return _wrapped("await " + call if inspect.iscoroutinefunction(found) else call)


def _wrapped(call: str, width: int = 110) -> str:
    if len(call) <= width:
        return call
    head, _, rest = call.partition("(")
    arguments, _, tail = rest.rpartition(")")
    lines, line = [], "   "
    for argument in arguments.split(", "):
        if len(line) + len(argument) > width - 2:
            lines.append(line)
            line = "   "
        line += f" {argument},"
    return "\n".join([f"{head}(", *lines, line, f"){tail}"])


def _type_name(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z]\w*)", "", text)


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {field.default!r}"
    return " = ..." if field.default_factory is not dataclasses.MISSING else ""


def _markdown(text: str) -> str:
    """A docstring as Markdown: its examples become fenced blocks, and their output comments."""
    shown = []
    for part in doctest.DocTestParser().parse(text):
        if isinstance(part, str):
            shown.append(part.replace("``", "`").strip("\n"))
            continue
        output = "".join(f"# {line}\n" for line in part.want.splitlines())
        shown.append(f"```python\n{part.source}{output}```")
    joined = "\n".join(each for each in shown if each.strip())
    return joined.replace("```\n```python\n", "") + "\n"


def _exceptions(module: Any) -> str:
    rows = ["| exception | raised when |", "| --- | --- |"]
    for name, found in vars(module).items():
        if inspect.isclass(found) and found.__module__ == module.__name__:
            meaning = (inspect.getdoc(found) or "").partition("\n\n")[0].replace("\n", " ").replace("``", "`")
            rows.append(f"| `{name}` ({', '.join(base.__name__ for base in found.__bases__)}) | {meaning} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
