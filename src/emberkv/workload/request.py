"""One request of a workload, recorded or generated."""

from dataclasses import dataclass

from emberkv.core.hashing import BlockHash
from emberkv.workload.chain import ContentChain, content_hashes
from emberkv.workload.content import Content, Span, stream_key


@dataclass(frozen=True, slots=True)
class After:
    """Follows another request: ``think_time`` seconds after that one completed."""

    request_id: str
    think_time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """arrival_time: seconds from the workload's start.

    content: what is known of the prompt and the answer together, from the first token on. It may end early, even
    before the prompt does (or say nothing, as in traces of lengths only): the rest is private to this request and
    shared with no other request.
    block_size: the blocks in which a trace described the prompt, in tokens; None where it is known token by token, or
    by length only.
    output_tokens: what is really generated; max_output_tokens: the limit that was asked for.
    session_id: empty where the trace tells no sessions. turn: 0 for a session's first request.

    >>> shared = Content([Span(stream_key("a system prompt"), 0, 32)])
    >>> lengths = {"prompt_tokens": 40, "output_tokens": 4, "max_output_tokens": 8}
    >>> first = Request(request_id="first", arrival_time=0.0, content=shared, **lengths)
    >>> second = Request(request_id="second", arrival_time=1.0, content=shared, **lengths)
    >>> blocks = zip(first.block_references(bytes(32), 16), second.block_references(bytes(32), 16), strict=True)
    >>> [one == other for one, other in blocks]
    [True, True, False]
    """

    request_id: str
    arrival_time: float
    prompt_tokens: int
    output_tokens: int
    max_output_tokens: int
    content: Content
    block_size: int | None = None
    client_id: str = ""
    session_id: str = ""
    turn: int = 0
    after: After | None = None

    def full_content(self) -> Content:
        """Prompt and answer, to the last token."""
        missing = self.prompt_tokens + self.output_tokens - len(self.content)
        if missing <= 0:
            return self.content
        return self.content + Content([Span(stream_key("private", self.request_id), 0, missing)])

    def chain(self, root: BlockHash, block_size: int, earlier: ContentChain | None = None) -> ContentChain:
        """What the core's scheduler takes for a sequence's tokens: the prompt, which appends its own answer.

        earlier: the chain of the turn before, which saves hashing what both have.
        """
        return ContentChain(root, self.full_content(), self.prompt_tokens, block_size, earlier)

    def block_references(self, root: BlockHash, block_size: int) -> list[BlockHash]:
        """The hash of every block that the prompt takes, the partial last one included."""
        content = self.content if len(self.content) >= self.prompt_tokens else self.full_content()
        return content_hashes(root, content, 0, self.prompt_tokens, block_size)
