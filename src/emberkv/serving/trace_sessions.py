"""Who a recorded request is and what it goes on from, in pseudonyms: of blocks, clients and sessions."""

from array import array
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b

from emberkv.core.hashing import TOKEN_BYTES, encode_tokens

KEY_BYTES = 32
MAX_SESSIONS = 10_000

_LINK_BYTES = 16
_ID_BYTES = 8


class KeyedIdentities:
    """Names that say what is equal within one recording, and nothing else. key: `KEY_BYTES`, of this recording alone.

    A guessed text cannot be looked up without the key, and equal content in two recordings has different names.
    """

    def __init__(self, key: bytes, block_size: int) -> None:
        self._key = key
        self._step = block_size * TOKEN_BYTES

    def links(self, salt: bytes, tokens: "array[int]", public_blocks: int = 0) -> list[bytes]:
        """Chained identities of the tokens' blocks, the partial last one included. From block ``public_blocks`` on,
        other salts have other identities.
        """
        encoded = encode_tokens(tokens)
        parent, found = b"", []
        for index, start in enumerate(range(0, len(encoded), self._step)):
            if index == public_blocks:
                parent = self._digest(parent, b"salt" + salt)
            parent = self._digest(parent, encoded[start : start + self._step])
            found.append(parent)
        return found

    def name(self, kind: str, text: str) -> str:
        """A pseudonym; "" stays so."""
        return self._digest(kind.encode(), text.encode()).hex()[: 2 * _ID_BYTES] if text else ""

    def _digest(self, context: bytes, content: bytes) -> bytes:
        return blake2b(
            len(context).to_bytes(1, "little") + context + content, key=self._key, digest_size=_LINK_BYTES
        ).digest()


def block_id(link: bytes) -> str:
    """As a trace has it."""
    return link[:_ID_BYTES].hex()


@dataclass(slots=True)
class Turn:
    """A request's place. tokens: of its prompt and, once it has ended, its answer. ended: in seconds of the clock."""

    request: str
    session: str
    number: int
    tokens: int
    ended: float | None = None


class SessionBook:
    """The last `MAX_SESSIONS` sessions' last turns, by name and by where their content ends."""

    def __init__(self) -> None:
        self._last: OrderedDict[str | bytes, Turn] = OrderedDict()
        self._unnamed = 0

    def enter(self, request: str, session: str, tokens: int, links: list[bytes]) -> tuple[Turn, Turn | None]:
        """The place of a request that arrives, and the turn before.

        session: as the client names it, or "": then it is the one whose last turn's blocks the prompt begins with and
        goes beyond. links: of the prompt's full blocks.
        """
        before = self._last.get(session) if session else self._by_content(tokens, links)
        if session:
            name = session
        elif before is not None:
            name = before.session
        else:
            self._unnamed += 1
            name = f"unnamed-{self._unnamed}"
        turn = Turn(request, name, before.number + 1 if before else 0, tokens)
        if session:
            self._put(session, turn)
        self.reached(turn, tokens, links)
        return turn, before

    def reached(self, turn: Turn, tokens: int, links: list[bytes]) -> None:
        """The turn's content is now so long. links: of its full blocks."""
        turn.tokens = tokens
        if links:
            self._put(links[-1], turn)

    def _by_content(self, tokens: int, links: list[bytes]) -> Turn | None:
        for link in reversed(links):
            turn = self._last.get(link)
            if turn is not None and turn.tokens < tokens:
                return turn
        return None

    def _put(self, key: str | bytes, turn: Turn) -> None:
        self._last[key] = turn
        self._last.move_to_end(key)
        if len(self._last) > 3 * MAX_SESSIONS:  # a name, a prompt's end and an answer's end each
            self._last.popitem(last=False)
