"""Compiling the kernels: once for a machine, and a clear word where it fails."""

import ctypes
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from emberkv.engine.torch.native import kernels as module
from emberkv.engine.torch.native.kernels import Kernels, build, find_kernels
from emberkv.errors import KernelsError
from tests.engine.conftest import ModelFactory
from tests.machine import MACHINE_CACHE
from tests.waiting import DEADLINE


def test_it_compiles_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sources with a common header, as compiling the kernels themselves takes long; the other tests do that."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "exported.hpp").write_text('#define EXPORTED extern "C" __attribute__((visibility("default")))\n')
    for name, value in (("first", 3), ("second", 5)):
        code = f'#include "exported.hpp"\nEXPORTED int {name}() {{ return {value}; }}\n'
        (sources / f"{name}.cpp").write_text(code)
    monkeypatch.setattr(module, "_SOURCES", sources)
    library = build(tmp_path / "new" / "folder")
    written = library.stat().st_mtime_ns
    assert build(library.parent) == library
    assert library.stat().st_mtime_ns == written
    assert list(library.parent.iterdir()) == [library]
    loaded = ctypes.CDLL(str(library))
    assert (loaded.first(), loaded.second()) == (3, 5)


def test_several_that_start_together_compile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, folder = tmp_path / "log", tmp_path / "cache"
    script = f"""case "$*" in
    *" -c "*) echo compiled >> {log};;
    *-shared*) for name; do :; done; echo linked > "$name";;
    esac"""
    replace_compiler(tmp_path, monkeypatch, script)
    all_start = Barrier(3)
    with ThreadPoolExecutor(3) as threads:
        libraries = list(threads.map(lambda _: build(folder, on_compile=lambda: wait_at(all_start)), range(3)))
    assert set(libraries) == set(folder.iterdir())
    assert log.read_text() == "compiled\n"


def wait_at(barrier: Barrier) -> None:
    barrier.wait(DEADLINE)


class CompilesError(Exception):
    """The library is not there yet."""


def stop() -> None:
    raise CompilesError


def test_other_flags_are_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    build(MACHINE_CACHE)
    build(MACHINE_CACHE, on_compile=stop)
    monkeypatch.setattr(module, "_FLAGS", (*module._FLAGS, "-O1"))
    with pytest.raises(CompilesError):
        build(MACHINE_CACHE, on_compile=stop)


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def replace_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    compiler = folder / "g++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")


def test_without_a_compiler_it_says_which_would_do(tmp_path: Path, no_compiler: None) -> None:
    with pytest.raises(KernelsError, match=r"no C\+\+ compiler: none of g\+\+, c\+\+ is on the PATH"):
        build(tmp_path)


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_compiler(tmp_path, monkeypatch, "echo 'unknown processor' >&2; exit 1")
    with pytest.raises(KernelsError, match=r"cannot compile the C\+\+ kernels: unknown processor"):
        build(tmp_path / "cache")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    with pytest.raises(KernelsError, match=f"cannot be put into {taken / 'below'}"):
        build(taken / "below")


def test_a_folder_that_others_can_write_into_is_not_trusted(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(KernelsError, match=f"{open_to_all} can be written by all users"):
        build(open_to_all)


def test_a_library_that_is_none_is_named(tmp_path: Path) -> None:
    wrong = tmp_path / "kernels.so"
    wrong.write_text("not machine code")
    with pytest.raises(KernelsError, match=f"{wrong} cannot be loaded"):
        Kernels(wrong)


def test_auto_takes_the_kernels_and_else_does_without(
    paged: ModelFactory, no_compiler: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert find_kernels("auto", paged("llama"), 16, tmp_path) is None
    assert "torch computes in place of the C++ kernels, which takes longer: no C++ compiler" in caplog.text
    with pytest.raises(KernelsError, match=r"no C\+\+ compiler"):
        find_kernels("native", paged("llama"), 16, tmp_path)


def test_what_is_wanted_is_what_computes(paged: ModelFactory, caplog: pytest.LogCaptureFixture) -> None:
    assert find_kernels("torch", paged("llama"), 16, MACHINE_CACHE) is None
    assert isinstance(find_kernels("auto", paged("llama"), 16, MACHINE_CACHE), Kernels)
    assert isinstance(find_kernels("native", paged("llama", "bfloat16"), 16, MACHINE_CACHE), Kernels)
    assert find_kernels("auto", paged("llama", "float16"), 16, MACHINE_CACHE) is None
    assert not [record for record in caplog.records if record.name.startswith("emberkv.engine.torch.native")]
    with pytest.raises(KernelsError, match=r"compute float32 and bfloat16 on a CPU; the model is float16 on cpu"):
        find_kernels("native", paged("llama", "float16"), 16, MACHINE_CACHE)


def test_values_that_do_not_come_in_pairs_are_left_to_torch(
    paged: ModelFactory, caplog: pytest.LogCaptureFixture
) -> None:
    assert isinstance(find_kernels("native", paged("llama"), 5, MACHINE_CACHE), Kernels)
    odd = "bfloat16 in heads and blocks of even size; here heads are of 16 and blocks of 5"
    with pytest.raises(KernelsError, match=odd):
        find_kernels("native", paged("llama", "bfloat16"), 5, MACHINE_CACHE)
    with caplog.at_level(logging.WARNING):
        assert find_kernels("auto", paged("llama", "bfloat16"), 5, MACHINE_CACHE) is None
    assert odd in caplog.text
