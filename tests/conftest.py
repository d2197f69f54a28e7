"""Fixtures that everybody shares: checkpoints and the tokenizer of the tiny model zoo.

PyTorch and other libraries are imported by the fixtures that need them: a run of tests without a model, and the process
that hands tests to others, do without the seconds that this takes.
"""

import gc
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from tests import machine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tests.tiers.redis_process import RedisProcess

CheckpointFactory = Callable[..., Path]

_YOUNG_OBJECTS = 5_000
"""After so many new objects the garbage collector looks for garbage. With the default, 700, it took 8% of the time of
tests without a model, and takes 3%.
"""

settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")  # a busy machine draws examples slowly, which is no fault of a test


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        action="store_true",
        help="more rounds of the tests that kill processes, and all replays of published figures",
    )
    parser.addoption(
        "--clients", action="store_true", help="install the libraries and agents of tests/clients, and try them"
    )
    parser.addoption("--compiled", action="store_true", help="end at once unless emberkv's hot modules are compiled")


def pytest_configure(config: pytest.Config) -> None:
    """Tests that are to run on compiled modules never run on the Python sources instead."""
    if config.getoption("--compiled") and not machine.COMPILED:
        raise pytest.UsageError(
            "--compiled is given, but emberkv.core.scheduler is not compiled; scripts/test --compiled compiles a copy"
        )
    if not config.getoption("--clients"):  # these are downloaded
        _skip_certificates()


def _skip_certificates() -> None:
    """Let httpx find no certificates of authorities, here and in servers. Each HTTP client reads them when it is made,
    which takes longer than most requests, and no test speaks TLS.
    """
    os.environ.pop("SSL_CERT_FILE", None)
    os.environ["SSL_CERT_DIR"] = os.devnull


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Modules and tests stay until the end: the garbage collector neither interrupts their making nor searches them.

    A worker of pytest-xdist hands what is wrong with the command line on, for `pytest_testnodedown`.
    """
    gc.disable()
    try:
        return (yield)
    except pytest.UsageError as error:
        output: dict[str, object] = getattr(session.config, "workeroutput", {})
        output["usage_error"] = [str(each) for each in error.args]
        raise
    finally:
        gc.enable()
        gc.freeze()
        gc.set_threshold(_YOUNG_OBJECTS, 20, 20)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A test that does not exist ends the run with pytest's own words, as it does without pytest-xdist."""
    if usage_error := getattr(node, "workeroutput", {}).get("usage_error"):
        raise pytest.UsageError(*usage_error)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First whole servers and the engine: their files take longest, and one that is begun last would leave cores idle.
    They take turns, as tests of servers mostly wait and those of the engine compute.
    """
    files = dict.fromkeys(item.path for item in items)
    place: dict[Path, float] = {}
    for folder in ("e2e", "engine"):
        chosen = [file for file in files if Path(__file__).parent / folder in file.parents]
        place |= {file: number / len(chosen) for number, file in enumerate(chosen)}
    items.sort(key=lambda item: place.get(item.path, 1.0))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are slower, not faster, on several threads that others may keep from running."""
    if "torch" not in sys.modules:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether tests that repeat themselves do so many times."""
    return bool(request.config.getoption("--long"))


@pytest.fixture(scope="session")
def clients(request: pytest.FixtureRequest) -> bool:
    """Whether clients are installed and tried."""
    return bool(request.config.getoption("--clients"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFactory:
    """``checkpoint(arch, dtype=torch.float32, seed=0)``: the folder of a tiny model, written once a session.

    Tests must not change what is in it.
    """
    import torch

    from tests.models import tiny_model

    folders: dict[tuple[str, torch.dtype, int], Path] = {}

    def get(arch: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
        key = (arch, dtype, seed)
        if key not in folders:
            folders[key] = tiny_model(arch, tmp_path_factory.mktemp(f"tiny-{arch}"), dtype, seed=seed)
        return folders[key]

    return get


@pytest.fixture(scope="session")
def fast_tokenizer() -> "PreTrainedTokenizerFast":
    """The tiny models' tokenizer as transformers has it."""
    from tests.models import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture
def copied(checkpoint: CheckpointFactory, tmp_path: Path) -> Path:
    """A llama checkpoint that the test may break."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))


@pytest.fixture(scope="session")
def redis_server() -> Iterator["RedisProcess"]:
    """One for all tests that do it no harm; each uses a prefix of its own."""
    from tests.tiers.redis_process import PROGRAM, RedisProcess

    if PROGRAM is None:
        pytest.skip("neither redis-server nor valkey-server is installed")
    with TemporaryDirectory() as folder, RedisProcess(Path(folder)) as server:
        yield server
