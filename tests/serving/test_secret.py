"""The server's secret: made once, private, whole."""

import logging
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from emberkv.errors import ConfigError, UntrustedPathError
from emberkv.serving.tenancy import server_secret


def test_a_given_one_goes_before_the_file(tmp_path: Path) -> None:
    assert server_secret("correct horse battery", tmp_path) == b"correct horse battery"
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cache"
    secret = server_secret(None, folder)
    assert len(secret) == 32
    assert server_secret(None, folder) == secret
    assert [path.name for path in folder.iterdir()] == ["secret"]
    assert stat.S_IMODE((folder / "secret").stat().st_mode) == 0o600
    assert (folder / "secret").read_bytes() == secret


def test_without_a_folder_each_start_has_its_own() -> None:
    assert server_secret(None, None) != server_secret(None, None)


def test_processes_that_start_together_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        secrets = set(threads.map(lambda _: server_secret(None, tmp_path), range(32)))
    assert len(secrets) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 33])
def test_a_file_that_is_no_secret_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "secret").write_bytes(content)
    with pytest.raises(ConfigError, match="it must hold 32 bytes; delete it to have a new one made"):
        server_secret(None, tmp_path)
    assert (tmp_path / "secret").read_bytes() == content


def test_one_that_others_can_read_is_used_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = server_secret(None, tmp_path)
    (tmp_path / "secret").chmod(0o644)
    with caplog.at_level(logging.WARNING):
        assert server_secret(None, tmp_path) == secret
    assert "is open to other users" in caplog.text


def test_one_that_others_may_have_written_is_refused(tmp_path: Path) -> None:
    server_secret(None, tmp_path)
    (tmp_path / "secret").chmod(0o666)
    with pytest.raises(UntrustedPathError, match="secret can be written by all users"):
        server_secret(None, tmp_path)


def test_a_link_to_a_secret_is_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "planted").write_bytes(b"x" * 32)
    (tmp_path / "secret").symlink_to("planted")
    assert server_secret(None, tmp_path) != b"x" * 32
    assert "no secret can be kept" in caplog.text
    assert (tmp_path / "planted").read_bytes() == b"x" * 32


def test_where_none_can_be_kept_the_server_starts_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        assert len(server_secret(None, tmp_path / "file" / "cache")) == 32
    assert "tenants' cached blocks end with this run" in caplog.text
