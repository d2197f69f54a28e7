"""Every block of a cache folder read and checked, whichever model it is of."""

from collections.abc import Iterable, Iterator

from emberkv.errors import BlockError
from emberkv.tiers.codec import verified_record
from emberkv.tiers.disk.files import BlockFiles
from emberkv.tiers.disk.layout import BlockFile


def verify(files: BlockFiles, listed: Iterable[BlockFile]) -> Iterator[tuple[BlockFile, str | None]]:
    """Each file that is still there, with what is wrong with it, or None. Nothing is changed."""
    for file in listed:
        try:
            data = files.read(file.path)
            verified_record(data, namespace=file.namespace, block_hash=file.block_hash, exact=file.exact)
        except FileNotFoundError:  # evicted by the process that writes here
            continue
        except OSError as error:
            yield file, f"unreadable: {error.strerror}"
        except BlockError as error:
            yield file, error.fault
        else:
            yield file, None
