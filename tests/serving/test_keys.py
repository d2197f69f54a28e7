"""Keys from files, and which cannot be used."""

from pathlib import Path

import pytest
from pydantic import SecretStr

from emberkv.config import ServeConfig
from emberkv.errors import ConfigError
from emberkv.serving.tenancy import ServerKeys, read_keys, server_keys


def keys_file(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_keys_of_a_file_are_added_to_those_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = keys_file(tmp_path, b"\xef\xbb\xbfone\r\n\n  two \n")
    config = ServeConfig(api_keys=(SecretStr("zero"),), api_key_file=path)
    assert server_keys(config) == ServerKeys(("zero", "one", "two"), None, None)
    assert caplog.messages == []


def test_the_operators_keys_come_from_files_too(tmp_path: Path) -> None:
    path = keys_file(tmp_path, b"root\n")
    assert server_keys(ServeConfig(admin_key_file=path)) == ServerKeys((), "root", None)
    assert server_keys(ServeConfig(metrics_key_file=path)) == ServerKeys((), None, "root")
    assert server_keys(ServeConfig(admin_key=SecretStr("a"), metrics_key=SecretStr("m"))) == ServerKeys((), "a", "m")
    two = keys_file(tmp_path, b"one\ntwo\n")
    with pytest.raises(ConfigError, match=r"^--admin-key-file .*keys holds 2 keys; it must hold one$"):
        server_keys(ServeConfig(admin_key_file=two))


@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_a_file_that_others_may_read_is_warned_of(tmp_path: Path, mode: int, caplog: pytest.LogCaptureFixture) -> None:
    path = keys_file(tmp_path, b"one", mode)
    assert read_keys("--api-key-file", path) == ("one",)
    assert caplog.messages == [
        f"the keys in {path} are open to other users; the file should be readable by its owner only"
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no key; write one key a line, or leave the option out"),
        (b" \n\t\n", "holds no key"),
        (b"fine\na\x00b", "line 2: the key begins or ends with a blank, or has a character that no header can carry"),
        (b"\xff\xfe", "is not UTF-8 at byte 0"),
        (b"x" * (2**20 + 1), "has more than 1,048,576 bytes"),
    ],
)
def test_a_file_that_holds_no_usable_key(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^--api-key-file .*keys,? {message}"):
        read_keys("--api-key-file", keys_file(tmp_path, content))
