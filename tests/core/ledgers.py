"""Ledgers that know given chains, and prompts explained from them."""

from emberkv.core.events import POOL, BlockStored
from emberkv.core.explaining.explain import explain
from emberkv.core.explaining.explanation import Explanation, MissReason, outcome_of
from emberkv.core.explaining.ledger import Ledger
from emberkv.core.hashing import TokenChain

SIZE = 4


class CountedChain(TokenChain):
    """Counts how often a block's tokens are asked for."""

    __slots__ = ("asked",)
    asked: int

    def block_tokens(self, index: int) -> bytes:
        self.asked += 1
        return super().block_tokens(index)

    def encoded_slice(self, start: int, stop: int) -> bytes:
        self.asked += 1
        return super().encoded_slice(start, stop)


def stored(tokens: TokenChain) -> BlockStored:
    blocks = tuple(tokens.block_tokens(index) for index in range(len(tokens.block_hashes)))
    return BlockStored(tuple(tokens.block_hashes), tokens.root, blocks, tokens.block_size)


def ledger_with(*chains: TokenChain) -> Ledger:
    ledger = Ledger()
    for each in chains:
        ledger.apply(stored(each), 1.0)
    return ledger


def asked(ledger: Ledger, prompt: TokenChain, *, alignment: int = SIZE) -> Explanation:
    runs = [(POOL, ledger.cached_run(prompt))]
    outcome = outcome_of(runs, len(prompt), block_size=SIZE, alignment=alignment)
    return explain(ledger, prompt, outcome, hit_unit=alignment)


def miss_spans(explanation: Explanation) -> list[tuple[MissReason, int, int]]:
    return [(miss.reason, miss.start, miss.tokens) for miss in explanation.misses]
