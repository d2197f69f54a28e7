"""Files and folders of another user, links and FIFOs are refused, in words that say what to do."""

import errno
import os
from pathlib import Path

import pytest

from emberkv.errors import UntrustedPathError
from emberkv.files import check_owner, open_own_file, read_own_file

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


def test_a_folder_of_one_s_own_is_trusted_and_one_that_all_may_write_to_is_not(tmp_path: Path) -> None:
    check_owner(tmp_path)
    tmp_path.chmod(0o777)
    with pytest.raises(UntrustedPathError, match=f"{tmp_path} can be written by all users; give a path of your own"):
        check_owner(tmp_path)


@needs_root
def test_a_path_of_another_user_is_not_trusted(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"planted")
    os.chown(file, 12345, 12345)
    for check in (check_owner, read_own_file):
        with pytest.raises(UntrustedPathError, match="belongs to user id 12345, and this process runs as 0"):
            check(file)


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    assert read_own_file(tmp_path / "file") == b"content"


def test_a_link_is_not_followed_nor_its_target_made(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        open_own_file(tmp_path / "link", os.O_RDWR | os.O_CREAT)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, make: object) -> None:
    assert callable(make)
    make(tmp_path / "odd")
    with pytest.raises(UntrustedPathError, match="odd is not a regular file; remove it"):
        read_own_file(tmp_path / "odd")
