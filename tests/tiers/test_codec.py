"""Blocks as bytes: what comes back is what went in, and damage of any kind is found."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberkv.errors import BlockError, CorruptBlockError, EntryError, ForeignBlockError
from emberkv.tiers.codec import BlockRecord, decode_record, encode_record, verified_record
from tests.tiers.build import NAMESPACE, OTHER, records

RECORD = records(3, payload_bytes=40)[2]
DATA = encode_record(RECORD, namespace=NAMESPACE)

any_hash = st.binary(min_size=32, max_size=32)
any_record = st.builds(
    BlockRecord,
    block_hash=any_hash,
    parent=any_hash,
    tokens=st.binary(max_size=64),
    position=st.integers(0, 2**32 - 1),
    exact=st.booleans(),
    payload=st.binary(max_size=300),
    partial=st.booleans(),
    keep_when_extended=st.booleans(),
)


@given(record=any_record, namespace=st.binary(max_size=255))
def test_a_record_comes_back(record: BlockRecord, namespace: bytes) -> None:
    assert decode_record(encode_record(record, namespace=namespace), namespace=namespace) == record


def test_whether_a_checkpoint_is_kept_changes_a_flag_and_the_checksum_alone() -> None:
    """So versions that do not know the flag read the rest."""
    kept = encode_record(replace(RECORD, keep_when_extended=True), namespace=NAMESPACE)
    assert [at for at in range(len(DATA) - 16) if kept[at] != DATA[at]] == [10]


def test_the_payload_is_not_copied() -> None:
    payload = decode_record(DATA, namespace=NAMESPACE).payload
    assert isinstance(payload, memoryview)
    assert payload.obj is DATA


def test_a_flipped_bit_at_any_position_is_found() -> None:
    for bit in range(8 * len(DATA)):
        flipped = bytearray(DATA)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            decode_record(bytes(flipped), namespace=NAMESPACE)
        except BlockError:
            continue
        pytest.fail(f"bit {bit % 8} of byte {bit // 8} is flipped, and the block is taken")


def test_a_block_truncated_anywhere_is_found() -> None:
    faults = set()
    for size in range(len(DATA)):
        with pytest.raises(CorruptBlockError) as caught:
            decode_record(DATA[:size], namespace=NAMESPACE)
        faults.add(caught.value.fault)
    assert faults == {"truncated"}


@settings(max_examples=300)
@given(junk=st.binary(max_size=400), at=st.integers(0, len(DATA)), cut=st.integers(0, 400))
def test_any_other_damage_is_found(junk: bytes, at: int, cut: int) -> None:
    damaged = DATA[:at] + junk + DATA[at + cut :]
    if damaged != DATA:
        with pytest.raises(BlockError):
            decode_record(damaged, namespace=NAMESPACE)


def test_a_block_with_something_after_it_is_refused() -> None:
    with pytest.raises(CorruptBlockError, match=f"{len(DATA) + 1} bytes; its header says {len(DATA)}"):
        decode_record(DATA + b"x", namespace=NAMESPACE)


def test_what_never_was_a_block_is_told_from_a_damaged_one() -> None:
    with pytest.raises(CorruptBlockError) as caught:
        decode_record(b"x" * 500, namespace=NAMESPACE)
    assert caught.value.fault == "no block"


def test_another_version_is_refused_by_name() -> None:
    newer = DATA[:8] + (2).to_bytes(2, "little") + DATA[10:]
    with pytest.raises(ForeignBlockError, match="block of version 2; this is version 1") as caught:
        decode_record(newer, namespace=NAMESPACE)
    assert caught.value.fault == "version"


def test_another_model_is_refused() -> None:
    with pytest.raises(ForeignBlockError) as caught:
        decode_record(DATA, namespace=OTHER)
    assert caught.value.fault == "namespace"


def verified(record: BlockRecord, block_hash: bytes, *, exact: bool = True) -> BlockRecord:
    data = encode_record(record, namespace=NAMESPACE)
    return verified_record(data, namespace=NAMESPACE, block_hash=block_hash, exact=exact)


def test_the_block_asked_for_passes() -> None:
    assert verified(RECORD, RECORD.block_hash) == RECORD


def test_a_rounded_block_passes_where_exactness_is_not_claimed() -> None:
    rounded = replace(RECORD, exact=False)
    assert verified(rounded, RECORD.block_hash, exact=False) == rounded
    with pytest.raises(ForeignBlockError) as caught:
        verified(rounded, RECORD.block_hash)
    assert caught.value.fault == "exactness"


def test_another_block_is_refused() -> None:
    with pytest.raises(ForeignBlockError) as caught:
        verified(RECORD, records(1)[0].block_hash)
    assert caught.value.fault == "hash"


@pytest.mark.parametrize("other", [replace(RECORD, tokens=bytes(16)), replace(RECORD, parent=bytes(32))])
def test_tokens_or_a_parent_that_do_not_make_the_hash_are_refused(other: BlockRecord) -> None:
    with pytest.raises(ForeignBlockError) as caught:
        verified(other, RECORD.block_hash)
    assert caught.value.fault == "chain"


@pytest.mark.parametrize(
    ("record", "namespace"),
    [
        (replace(RECORD, block_hash=b"short"), NAMESPACE),
        (replace(RECORD, parent=b""), NAMESPACE),
        (RECORD, b"n" * 256),
    ],
)
def test_what_no_header_holds_is_not_encoded(record: BlockRecord, namespace: bytes) -> None:
    with pytest.raises(EntryError):
        encode_record(record, namespace=namespace)
