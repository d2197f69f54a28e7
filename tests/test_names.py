"""One name, one meaning: classes of different modules have different names, and programs are described as programs."""

import re
from collections import defaultdict
from pathlib import Path

import emberkv

SOURCE = Path(emberkv.__file__).parent
WRITTEN = {
    str(path.relative_to(SOURCE)): path.read_text(encoding="utf-8")
    for suffix in ("py", "cpp", "hpp", "lua")
    for path in SOURCE.rglob(f"*.{suffix}")
}

OF_THE_API = {"serving/openapi.py"}
"""Its classes are shapes of JSON, which have the names that the APIs give them."""

OF_OTHERS = {"bench/runner.py", "engine/warmup.py"}
"""They hold texts for models, of common English words."""

NOT_OF_PROGRAMS = re.compile(r"\b(told|tells|telling|whoever|nobody|wish|wishes)\b", re.IGNORECASE)
"""Words for people, which say of a thread or a function neither what it does nor by what."""


def test_no_two_modules_give_a_public_class_the_same_name() -> None:
    found = defaultdict[str, list[str]](list)
    for path, text in WRITTEN.items():
        if path.endswith(".py") and path not in OF_THE_API:
            for name in re.findall(r"^class ([A-Z]\w*)", text, re.MULTILINE):
                found[name].append(path)
    assert len(found) > 500
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


def test_programs_are_not_described_as_people() -> None:
    lines = [(path, line) for path in WRITTEN.keys() - OF_OTHERS for line in WRITTEN[path].splitlines()]
    assert [(path, line) for path, line in lines if NOT_OF_PROGRAMS.search(line)] == []
