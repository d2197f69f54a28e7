"""SentencePiece's BPE as a list of merges, which is what the tokenizers library follows.

SentencePiece joins those two neighbours in a text whose joint piece has the highest score, the leftmost of equal ones,
until no two make a piece. The library joins those that come first in a list. Both give the same tokens where pieces are
made of pieces, and where no two that could compete have the same score. The usual ones that do, runs of spaces, are
made from left to right, each as long as it gets: the merge with the longer left half comes first.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping

from emberkv.errors import CorruptModelError, UnsupportedModelError

_LONGEST = 1024
"""Characters of a piece. SentencePiece learns pieces of at most 16 unless it is set otherwise; the time that a piece
takes here grows with the square of its length."""


def find_merges(scores: Mapping[str, float], unused: Collection[str], added: Collection[str]) -> list[tuple[str, str]]:
    """All merges to the pieces in ``scores``, in the order in which they are to be done.

    unused: pieces that text is not made of, though they have ids. added: tokens that are found in a text before it is
    cut into pieces.

    Raises UnsupportedModelError where a list of merges would not give SentencePiece's tokens, and CorruptModelError for
    a piece that is longer than any tokenizer's.
    """
    long = next((piece for piece in (*scores, *unused) if len(piece) > _LONGEST), None)
    if long is not None:
        raise CorruptModelError(
            f"it has a piece of {len(long)} characters, which begins with {long[:16]!r}; at most {_LONGEST} are read"
        )
    made = next((piece for piece in unused if any(True for _ in _halves(piece, scores, added))), None)
    if made is not None:
        raise UnsupportedModelError(f"its tokenizer marks {made!r} as unused, and other pieces make it")
    merges: list[tuple[float, str, str]] = []
    by_score: dict[float, list[str]] = defaultdict(list)
    for piece, score in scores.items():
        found = list(_halves(piece, scores, added))
        if not found:
            continue
        if score != int(score):
            raise UnsupportedModelError(
                f"its tokenizer says that it is SentencePiece's BPE, and {piece!r} has the score {score}, as pieces of "
                "a unigram model have"
            )
        merges.extend((-score, left, right) for left, right in found)
        by_score[score].append(piece)
    for equal in by_score.values():
        _require_no_competition(equal, scores)
    merges.sort(key=lambda merge: (merge[0], -len(merge[1])))
    return [(left, right) for _, left, right in merges]


def _halves(piece: str, known: Collection[str], added: Collection[str]) -> Iterator[tuple[str, str]]:
    """The pairs of pieces that make ``piece``.

    Raises UnsupportedModelError for a half of one character that is no piece: SentencePiece would join it all the same.
    """
    for cut in range(1, len(piece)):
        left, right = piece[:cut], piece[cut:]
        if left in known and right in known:
            yield left, right
        elif all(half in known or (len(half) == 1 and half not in added) for half in (left, right)):
            lone = left if left not in known else right
            raise UnsupportedModelError(f"its tokenizer makes {piece!r} of {lone!r}, which it does not have as a piece")


def _require_no_competition(equal: list[str], known: Collection[str]) -> None:
    """Of pieces with the same score, none may end in a piece that another begins with, unless both are runs of one
    character: the leftmost would be made first, and a list of merges says nothing of the place."""
    if len(equal) == 1:
        return
    begun: dict[str, dict[str, str]] = defaultdict(dict)  # by a beginning, two pieces of different kinds at most
    for piece in equal:
        for start in (piece[:cut] for cut in range(1, len(piece))):
            if start in known and len(begun[start]) < 2:
                begun[start].setdefault(_kind(piece), piece)
    for piece in equal:
        for end in (piece[cut:] for cut in range(1, len(piece))):
            other = next((each for kind, each in begun.get(end, {}).items() if kind != _kind(piece)), None)
            if other is not None:
                raise UnsupportedModelError(
                    f"its tokenizer gives {piece!r} and {other!r} the same score, so that it depends on their place "
                    "which of them is made of a text"
                )


def _kind(piece: str) -> str:
    """The same for all runs of one character; of other pieces, each its own."""
    return piece[0] if piece == piece[0] * len(piece) else piece
