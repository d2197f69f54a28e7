"""The store of clients' KV tensors, held against a plain model of it."""

import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from emberkv.errors import RequestError
from emberkv.serving.kv_tensors import KVTensorStore, StoredLayer, StoreTooSmallError
from emberkv.tensors import TensorBytes

ROW_BYTES = 2 * (2 * 3 * 4)  # of k and v together
ROW = (2, 3)


def rows(count: int, fill: float = 0.0, *, shape: tuple[int, ...] = ROW, dtype: str = "float32") -> TensorBytes:
    array = np.full((count, *shape), fill, dtype)
    return TensorBytes(dtype, array.shape, array.tobytes())


def values(tensor: TensorBytes) -> NDArray[Any]:
    return np.frombuffer(tensor.data, tensor.dtype).reshape(tensor.shape)


def store(max_bytes: int = 2**20, max_entries: int = 100) -> KVTensorStore:
    return KVTensorStore(max_bytes=max_bytes, max_entries=max_entries)


def test_appended_rows_follow_those_that_were_put() -> None:
    kept = store()
    assert kept.put(("", "s"), 0, rows(2, 1), rows(2, 2)) == 2
    assert kept.append(("", "s"), 0, rows(1, 3), rows(1, 4)) == 3
    found = kept.get(("", "s"), 0)
    assert found is not None
    assert found.seq_len == 3
    assert values(found.k)[:, 0, 0].tolist() == [1, 1, 3]
    assert values(found.v)[:, 0, 0].tolist() == [2, 2, 4]


def test_a_copy_that_was_given_out_does_not_change() -> None:
    kept = store()
    kept.put(("", "s"), 0, rows(1, 1), rows(1, 1))
    before = kept.get(("", "s"), 0)
    kept.append(("", "s"), 0, rows(1, 2), rows(1, 2))
    assert before is not None
    assert before.k.shape == (1, *ROW)


COMPUTED = StoredLayer(rows(3, 1), rows(3, 2), copy_of="a request")


def test_rows_behind_others_that_come_together_are_all_kept() -> None:
    kept = store()
    assert kept.append(("", "s"), 0, rows(1, 3), rows(1, 4), behind=COMPUTED) == 4
    assert kept.append(("", "s"), 0, rows(1, 5), rows(1, 6), behind=COMPUTED) == 5
    found = kept.get(("", "s"), 0)
    assert found is not None
    assert values(found.k)[:, 0, 0].tolist() == [1, 1, 1, 3, 5]
    assert values(found.v)[:, 0, 0].tolist() == [2, 2, 2, 4, 6]
    assert (kept.stats().entries, kept.stats().bytes) == (1, 5 * ROW_BYTES)


def test_rows_that_were_put_meanwhile_are_not_replaced_by_a_copy() -> None:
    kept = store()
    kept.put(("", "s"), 0, rows(1, 7), rows(1, 7))
    assert kept.append(("", "s"), 0, rows(1), rows(1), behind=COMPUTED) == 2


def test_a_refused_append_leaves_no_copy() -> None:
    kept = store(max_bytes=4 * ROW_BYTES - 1)
    with pytest.raises(StoreTooSmallError):
        kept.append(("", "s"), 0, rows(1), rows(1), behind=COMPUTED)
    with pytest.raises(RequestError, match="those stored have shape"):
        kept.append(("", "s"), 0, rows(0, shape=(3, 3)), rows(0), behind=COMPUTED)
    assert (kept.stats().entries, kept.stats().sequences, kept.stats().bytes) == (0, 0, 0)


def test_copies_of_other_requests_rows_are_forgotten() -> None:
    kept = store()
    kept.append(("", "s"), 0, rows(1), rows(1), behind=COMPUTED)
    kept.put(("", "s"), 1, rows(2), rows(2))
    kept.forget_copies(("", "s"), "a request")
    assert kept.length(("", "s"), 0) == 4
    kept.forget_copies(("", "s"), "the next one")
    assert [kept.length(("", "s"), layer) for layer in (0, 1)] == [0, 2]
    assert (kept.stats().entries, kept.stats().bytes) == (1, 2 * ROW_BYTES)


def test_a_sequence_of_copies_alone_is_forgotten_with_them() -> None:
    kept = store()
    kept.append(("", "s"), 0, rows(1), rows(1), behind=COMPUTED)
    kept.forget_copies(("", "s"))
    assert kept.stats() == store().stats()


@pytest.mark.parametrize(
    "wrong",
    [rows(1, shape=(3, 3)), rows(1, shape=(2, 4)), rows(1, shape=(2,)), rows(1, dtype="float16")],
    ids=["heads", "head_dim", "dimensions", "dtype"],
)
def test_rows_of_another_shape_or_dtype_are_not_appended(wrong: TensorBytes) -> None:
    kept = store()
    kept.put(("", "s"), 0, rows(2), rows(2))
    for k, v in ((wrong, rows(1)), (rows(1), wrong)):
        with pytest.raises(RequestError, match=r"rows of shape .* those stored have shape \[2, 3\] in float32"):
            kept.append(("", "s"), 0, k, v)
    assert kept.length(("", "s"), 0) == 2
    assert kept.stats().bytes == 2 * ROW_BYTES


def test_k_and_v_have_as_many_rows() -> None:
    with pytest.raises(RequestError, match="k has 1 rows and v has 2"):
        store().put(("", "s"), 0, rows(1), rows(2))
    with pytest.raises(RequestError, match="single number"):
        store().put(("", "s"), 0, TensorBytes("float32", (), bytes(4)), rows(1))


def test_tenants_with_the_same_id_have_different_sequences() -> None:
    kept = store()
    kept.put(("a", "s"), 0, rows(1), rows(1))
    assert kept.get(("b", "s"), 0) is None
    assert not kept.delete(("b", "s"))
    assert kept.length(("a", "s"), 0) == 1


def test_the_least_recently_used_sequence_is_evicted_whole() -> None:
    kept = store(max_bytes=4 * ROW_BYTES)
    for name in ("a", "b"):
        for layer in range(2):
            kept.put(("", name), layer, rows(1), rows(1))
    assert kept.length(("", "a"), 0) == 1  # a use
    kept.put(("", "c"), 0, rows(1), rows(1))
    assert [kept.length(("", name), layer) for name in "abc" for layer in range(2)] == [1, 1, 0, 0, 1, 0]
    assert kept.stats().evicted_sequences == 1


def test_a_sequence_that_alone_exceeds_a_limit_is_refused_and_nothing_is_lost() -> None:
    kept = store(max_bytes=3 * ROW_BYTES, max_entries=2)
    kept.put(("", "a"), 0, rows(1), rows(1))
    kept.put(("", "b"), 0, rows(1), rows(1))
    before = kept.stats()
    with pytest.raises(StoreTooSmallError, match=f"{4 * ROW_BYTES} bytes; --kv-max-bytes is {3 * ROW_BYTES}"):
        kept.append(("", "b"), 0, rows(3), rows(3))
    assert kept.stats() == before
    kept.put(("", "b"), 1, rows(1), rows(1))
    with pytest.raises(StoreTooSmallError, match="3 layers; --kv-max-entries is 2"):
        kept.put(("", "b"), 2, rows(1), rows(1))


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["put", "append", "get", "length", "delete"]),
        st.sampled_from("abcd"),
        st.integers(0, 2),
        st.integers(0, 3),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(OPERATIONS)
def test_it_does_what_a_plain_model_of_it_does(operations: list[tuple[str, str, int, int]]) -> None:
    most_bytes, most_entries = 9 * ROW_BYTES, 5
    kept = store(most_bytes, most_entries)
    model: OrderedDict[str, dict[int, list[int]]] = OrderedDict()  # rows' values, by sequence and layer

    def size() -> int:
        return ROW_BYTES * sum(len(layer) for layers in model.values() for layer in layers.values())

    for number, (kind, name, layer, count) in enumerate(operations):
        key = ("", name)
        if kind in ("put", "append"):
            changed = {**model.get(name, {})}
            changed[layer] = (changed.get(layer, []) if kind == "append" else []) + [number] * count
            alone = sum(len(each) for each in changed.values()) * ROW_BYTES
            operation = kept.put if kind == "put" else kept.append
            if alone > most_bytes or len(changed) > most_entries:
                with pytest.raises(StoreTooSmallError):
                    operation(key, layer, rows(count, number), rows(count, number))
                continue
            assert operation(key, layer, rows(count, number), rows(count, number)) == len(changed[layer])
            model[name] = changed
            model.move_to_end(name)
            while size() > most_bytes or sum(map(len, model.values())) > most_entries:
                model.popitem(last=False)
        elif kind == "delete":
            assert kept.delete(key) == (model.pop(name, None) is not None)
        else:
            if name in model:
                model.move_to_end(name)
            expected = model.get(name, {}).get(layer)
            found = kept.get(key, layer) if kind == "get" else None
            if found is not None:
                assert values(found.k)[:, 0, 0].tolist() == expected
            assert kept.length(key, layer) == len(expected or [])
        stats = kept.stats()
        assert (stats.sequences, stats.entries) == (len(model), sum(map(len, model.values())))
        assert stats.bytes == size()


def test_threads_that_append_lose_no_row() -> None:
    kept = store()

    def append_all() -> None:
        for _ in range(50):
            kept.append(("", "s"), 0, rows(1), rows(1))

    threads = [threading.Thread(target=append_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept.length(("", "s"), 0) == 200
    assert kept.stats().bytes == 200 * ROW_BYTES
