"""Attention of a prefill chunk, in tiles that give the same bits in whatever chunk they are computed."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from emberkv.engine.torch.attention.attention_math import tile_attention
from emberkv.engine.torch.attention.kv_pool import KVPool
from emberkv.engine.torch.attention.paged_attention import AttentionStep, LayerCall


@dataclass(frozen=True, slots=True)
class _Tile:
    """Queries attended over together. rows: which of the chunk's tokens; keys: which of the gathered keys."""

    rows: slice
    keys: slice
    hidden: Tensor  # bool [tile, n]: not to be seen of the last n keys


class PrefillStep(AttentionStep):
    """Tokens ``[start, start + length)`` of one sequence; ``start`` is a multiple of ``tile`` and the block size.

    block_ids: the sequence's block table, covering at least ``start + length`` tokens. tile: attention is computed in
    tiles cut at absolute multiples of so many tokens, so that a token's result does not depend on the chunk it is in.

    A whole tile at a position always has the same shape. The number of keys is rounded up to one of a few, and a
    prompt's last tile is filled up, with zeros that no query sees: oneDNN keeps close to a megabyte for each shape met.
    """

    def __init__(self, pool: KVPool, block_ids: list[int], start: int, length: int, *, tile: int) -> None:
        self._pool = pool
        self._start = start
        self._stop = start + length
        self._tile = tile
        whole, rest = divmod(self._stop, pool.block_size)
        pool.clear(block_ids[whole : whole + 1] if rest else [])
        rows = pool.rows(block_ids)
        positions = torch.arange(start, self._stop, device=pool.device)
        self._write = pool.write_index(rows[positions // pool.block_size], positions % pool.block_size)
        self._rows = rows[: -(-self._stop // pool.block_size)]
        self._views: dict[int | None, tuple[Tensor, int, list[_Tile]]] = {}

    def attend(self, call: LayerCall, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        self._pool.write(self._write[call.layer], keys, values)
        index, count, tiles = self._view(call.window)
        # One copy to head-major order costs far less than products over strided keys, tile after tile.
        all_keys, all_values = self._pool.gather_heads(index[call.layer], count)
        parts = [
            tile_attention(
                self._filled(queries[tile.rows]),
                all_keys[:, tile.keys],
                all_values[:, tile.keys],
                call.scale,
                tile.hidden,
                softcap=call.softcap,
                scratch=self._pool.scores,
            )
            for tile in tiles
        ]
        return torch.cat(parts)[: queries.shape[0]]  # only the last part may be filled up

    def _filled(self, queries: Tensor) -> Tensor:
        """The tile's queries, zeros added up to half a tile or a whole one."""
        count = queries.shape[0]
        missing = (self._tile if 2 * count > self._tile else self._tile // 2) - count
        return pad(queries, (0, 0, 0, 0, 0, missing)) if missing else queries

    def _view(self, window: int | None) -> tuple[Tensor, int, list[_Tile]]:
        """Under ``window``: the blocks to gather, the number of keys to make of them, and the tiles over these."""
        if window is not None and window >= self._stop:
            window = None
        if window not in self._views:
            size = self._pool.block_size
            gathered = self._first_key(self._start, window) // size * size
            tiles = []
            for start in range(self._start, self._stop, self._tile):
                first = self._first_key(start, window)
                keys = rounded_keys(start + self._tile - first)
                tiles.append(
                    _Tile(
                        slice(start - self._start, min(start + self._tile, self._stop) - self._start),
                        slice(first - gathered, first - gathered + keys),
                        self._hidden(start, first, keys, window),
                    )
                )
            count = max(tile.keys.stop for tile in tiles)
            self._views[window] = self._pool.gather_index(self._rows[gathered // size :]), count, tiles
        return self._views[window]

    @staticmethod
    def _first_key(position: int, window: int | None) -> int:
        return 0 if window is None else max(0, position - window + 1)

    def _hidden(self, start: int, first: int, keys: int, window: int | None) -> Tensor:
        device = self._pool.device
        at = torch.arange(start, start + self._tile, device=device).unsqueeze(1)
        if window is None:
            return torch.arange(start, first + keys, device=device) > at
        key_at = torch.arange(first, first + keys, device=device)
        return (key_at > at) | (key_at <= at - window)


def rounded_keys(keys: int) -> int:
    """Up to the next of sixteen numbers per power of two, and to a multiple of 64 at least."""
    step = max(64, (1 << keys.bit_length()) // 32)
    return -(-keys // step) * step
