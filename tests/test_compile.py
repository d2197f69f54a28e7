"""Which modules `scripts/compile.py` compiles; nothing is compiled here."""

from scripts.compile import HOT, SOURCES, compiled_sources, imported_packages

COMPILED = {str(file.relative_to(SOURCES / "emberkv")) for file in compiled_sources()}


def test_the_modules_that_run_for_every_request_are_compiled_and_exist() -> None:
    wanted = {"core/scheduler.py", "core/policies/eviction.py", "cluster/routing.py", "workload/source.py"}
    assert wanted | {f"{package}/{name}.py" for package, names in HOT.items() for name in names} <= COMPILED
    assert all(file.is_file() for file in compiled_sources())


def test_modules_of_pydantic_and_numpy_stay_python() -> None:
    assert "pydantic" in imported_packages(SOURCES / "emberkv/workload/spec.py")
    assert "workload/spec.py" not in COMPILED
    assert not [file for file in compiled_sources() if imported_packages(file) & {"numpy", "pydantic"}]
