"""Prompts of forwarded requests as block hashes, of tokens if the tokenizer is known, else of text."""

import json
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emberkv.cluster.cluster_engine import ClusterEngine
from emberkv.core.hashing import TOKEN_BYTES, TokenChain, root_hash
from emberkv.engine.recent_chains import RecentChains
from emberkv.engine.request import GenerationRequest, SamplingParams
from emberkv.engine.tokenization.tokenizer import IncrementalDetokenizer, KnownTokens, Tokenizer
from emberkv.errors import ConfigError, RequestError, reason_of
from emberkv.serving.api.openai_schema import ChatCompletionRequest, TemplateOptions
from emberkv.serving.api.rendering import Applied, canonical_chat
from emberkv.serving.api.validation import Json, parse_body
from emberkv.serving.canonical import CanonicalRules
from emberkv.serving.event_stream import compact_json
from emberkv.serving.tenancy import Tenant

_ANY_ANSWER = SamplingParams(max_tokens=1)


_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*")


def model_tokenizer(model: str) -> Tokenizer:
    """The tokenizer of a model folder or hub id. No weights are downloaded, and PyTorch is not imported.

    Raises ConfigError if there is no tokenizer or it cannot be read.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - an extra
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - takes a second

    from emberkv.engine.tokenization.hf_tokenizer import HFTokenizer  # noqa: PLC0415 - as above
    from emberkv.engine.tokenization.template_check import install_chat_template  # noqa: PLC0415 - as above

    folder = Path(model).expanduser()
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(model, allow_patterns=list(_TOKENIZER_FILES)))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # these libraries raise errors of many types
        raise ConfigError(
            f"MODEL is {model!r}, whose tokenizer cannot be read: {reason_of(error)}; give a folder with a "
            "tokenizer.json, or a hub id"
        ) from error
    return HFTokenizer(tokenizer, chat_problem=install_chat_template(tokenizer, folder, None))


class PieceTokenizer:
    """A substitute for an unknown tokenizer: every four bytes of UTF-8 text are a token, about as in English text.

    A conversation is rendered as JSON, with a line for each tool and each message, so conversations with a common
    prefix have a common prefix of tokens. There are no special tokens.

    >>> pieces = PieceTokenizer().encode("hello", add_special_tokens=False)
    >>> [PieceTokenizer().token_text(each) for each in pieces]
    ['hell', 'o']
    """

    cache_bytes = 0
    chat_problem: str | None = None
    description: Mapping[str, Any] = {}

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool,
        max_tokens: int | None = None,
        known: Sequence[KnownTokens] = (),
    ) -> "array[int]":
        data = text.encode("utf-8", "surrogatepass")
        pieces = array("i")
        pieces.frombytes(data + bytes(-len(data) % TOKEN_BYTES))
        return pieces

    def cuts(self, text: str, start: int) -> Iterator[int]:
        return iter(())

    def template_reads(self, variable: str) -> bool:
        return True

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        parts = [*([variables] if variables else []), *(tools or ()), *messages]
        return "".join(f"{json.dumps(part, ensure_ascii=False, sort_keys=True)}\n" for part in parts)

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return array("i", [token_id]).tobytes().rstrip(b"\0")

    def detokenizer(self, keep: Collection[str] = ()) -> IncrementalDetokenizer:
        return _PieceDetokenizer(self)

    def files(self) -> dict[str, bytes]:
        return {}

    def remembering_for(self, owner: str) -> "PieceTokenizer":
        return self


class _PieceDetokenizer:
    def __init__(self, tokenizer: PieceTokenizer) -> None:
        self._tokenizer = tokenizer
        self._data = b""

    def push(self, token_ids: Sequence[int]) -> str:
        self._data += b"".join(map(self._tokenizer.token_bytes, token_ids))
        return ""

    def flush(self) -> str:
        text, self._data = self._data.decode("utf-8", "replace"), b""
        return text


@dataclass(frozen=True, slots=True)
class RoutedPrompt:
    """A prompt as a chain of blocks.

    tokenizer: decodes the chain's tokens. in_tokens: whether they are the model's own tokens and not those of
    `PieceTokenizer`.
    """

    chain: TokenChain
    tokenizer: Tokenizer
    in_tokens: bool


class PromptReader:
    """Converts request bodies to prompts for routing. It rejects no request: a prompt that cannot be rendered is
    compared as text.

    tokenizer: the model's, if it is known. model: its name, which the block hashes depend on. block_size: tokens of a
    block, for models that no emberkv worker serves.
    """

    def __init__(self, *, tokenizer: Tokenizer | None = None, model: str = "", block_size: int) -> None:
        self.block_size = block_size
        self.root = root_hash(f"foreign-tokens:{model}", block_size)
        self._tokenizer = tokenizer
        self._pieces = PieceTokenizer()
        self._text_root = root_hash("foreign-text", block_size)
        self._chains = RecentChains(block_size)

    @property
    def knows_tokens(self) -> bool:
        """Whether the model's tokenizer is known."""
        return self._tokenizer is not None

    def read(self, body: Json, tenant: Tenant, own: tuple[Tokenizer, ClusterEngine] | None = None) -> RoutedPrompt:
        """The prompt of a request's body.

        own: the tokenizer and engine of emberkv workers that serve the model, too; their block hashes are used then.
        Without them, block hashes do not depend on the tenant, as a foreign worker shares its cache among all clients.
        """
        tokenizer = own[0] if own is not None else self._tokenizer
        tokens = None if tokenizer is None else _tokens(body, tokenizer.remembering_for(tenant.name))
        if tokenizer is not None and tokens is not None:
            if own is not None:
                chain = own[1].chain(GenerationRequest("", tokens, _ANY_ANSWER, tenant.salt, tenant=tenant.name))
                return RoutedPrompt(chain, tokenizer, in_tokens=True)
            return RoutedPrompt(self._chain(self.root, tokens, body), tokenizer, in_tokens=True)
        pieces = self._pieces.encode(_text(body, self._pieces), add_special_tokens=False)
        return RoutedPrompt(self._chain(self._text_root, pieces, body), self._pieces, in_tokens=False)

    def _chain(self, root: bytes, tokens: Sequence[int], body: Json) -> TokenChain:
        """The chain of a prompt. Block hashes differ by model and by the request's ``cache_salt``."""
        salt = compact_json([str(body.get("model")), body.get("cache_salt")]).encode()
        salt = b"" if root == self.root and body.get("cache_salt") is None else salt
        return self._chains.chain(root, tokens, owner="", salt=salt, public_blocks=0, remember=True)


def _tokens(body: Json, tokenizer: Tokenizer) -> Sequence[int] | None:
    """The prompt's tokens; None if it cannot be rendered or tokenized here. The worker then accepts or rejects it."""
    messages, tools = objects(body.get("messages")), objects(body.get("tools") or [])
    try:
        if "messages" not in body:
            prompt = _first(body.get("prompt"))
            return tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
        if messages is None or tools is None:
            return None
        options = parse_body(TemplateOptions, compact_json(body).encode())
        conversation = options.conversation_of(messages, tools)
        if conversation.left_out:  # the worker may read more than its text
            return None
        return tokenizer.encode(conversation.prompt_text(tokenizer), add_special_tokens=False)
    except RequestError:
        return None


def _first(prompt: object) -> str | list[int] | None:
    """The first prompt of a completion request, by which the request is routed; None if it is invalid."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    tokens = [each for each in prompt if type(each) is int and 0 <= each < 2**31] if isinstance(prompt, list) else []
    return tokens if isinstance(prompt, list) and prompt and len(tokens) == len(prompt) else None


def _text(body: Json, pieces: PieceTokenizer) -> str:
    messages = objects(body.get("messages"))
    if messages is None:
        prompt = body.get("prompt", body.get("messages"))
        return prompt if isinstance(prompt, str) else compact_json(prompt)
    variables = body.get("chat_template_kwargs")
    return pieces.render_chat(
        messages, tools=objects(body.get("tools")), variables=variables if isinstance(variables, dict) else None
    )


def objects(value: object) -> list[Json] | None:
    """The value if it is a list of JSON objects, else None."""
    return value if isinstance(value, list) and all(isinstance(each, dict) for each in value) else None


def canonical_body(body: Json, rules: CanonicalRules | None) -> tuple[Json, Applied]:
    """A chat request's body, rewritten by the canonical rules, and how often each rule was applied."""
    messages, tools = objects(body.get("messages")), objects(body.get("tools") or [])
    if rules is None or messages is None or tools is None:
        return body, {}
    request = ChatCompletionRequest.model_construct(messages=messages, tools=tools or None)
    rewritten, counts = canonical_chat(request, rules)
    if not counts:
        return body, {}
    return {**body, "messages": rewritten.messages, **({"tools": rewritten.tools} if tools else {})}, counts
