"""Requests of the OpenAI API: their fields, and which of these are refused or left out."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, model_validator

from emberkv.engine.request import MAX_TOP_LOGPROBS, Constraint, SamplingParams
from emberkv.errors import RequestError
from emberkv.serving.api.conversation import STRUCTURED_FIELDS, Conversation, constraint_of_body, count_left_out
from emberkv.serving.api.openai_messages import MessageReader, template_tools, tool_choice_of
from emberkv.serving.api.validation import Integer, RequestBody
from emberkv.validation import shown

_TOKEN_ID = re.compile(r"[0-9]{1,10}")

MAX_SALT = 256
MAX_ANSWERS = 64  # prompts times n, in one HTTP request
MAX_ECHOED_LOGPROBS = 2**18  # prompt tokens, times what is reported of each, in one HTTP request
DEFAULT_COMPLETION_TOKENS = 16  # as in OpenAI's own /v1/completions

_UNSUPPORTED = (
    "add_special_tokens",
    "allowed_token_ids",
    "audio",
    "bad_words",
    "chat_template",
    "documents",
    "echo",
    "include_stop_str_in_output",
    "prompt_embeds",
    "prompt_logprobs",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "suffix",
    "truncate_prompt_tokens",
    "use_beam_search",
    "web_search_options",
)

_WITHOUT_EFFECT = frozenset(
    {
        "metadata",
        "prediction",
        "priority",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "store",
        "user",
        *STRUCTURED_FIELDS,
    }
)
"""Fields that no class here names and that change no answer of a text server, or are looked at elsewhere."""


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class OpenAIRequest(RequestBody):
    """What chat and plain completions have in common. ``top_k`` and the fields after it are extensions."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Integer | None = None
    best_of: Integer | None = None
    stop: str | list[str] | None = None
    seed: Integer | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    user: str | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Integer] | None = None
    min_tokens: Integer | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT)] | None = None

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Raises RequestError for what is not supported."""
        self.refuse(*_UNSUPPORTED)
        if (self.model_extra or {}).get("skip_special_tokens") is False:
            raise RequestError("skip_special_tokens is false; leave it out", param="skip_special_tokens")
        if not 1 <= self.choices <= MAX_ANSWERS:
            raise RequestError(f"n is {self.n}; it must be from 1 to {MAX_ANSWERS}", param="n")
        if self.best_of is not None and self.best_of != self.choices:
            raise RequestError(
                f"best_of is {self.best_of}; it is not supported: leave it out, or make it n ({self.choices})",
                param="best_of",
            )
        field, most = self.wanted_tokens
        if most and self.min_tokens and self.min_tokens > most:
            raise RequestError(
                f"min_tokens is {self.min_tokens}; it must be at most {field}, {most}", param="min_tokens"
            )

    @property
    def wanted_tokens(self) -> tuple[str, int | None]:
        """The field that says how many tokens an answer may have, and what it says."""
        return "max_tokens", self.max_tokens

    @property
    def session(self) -> str:
        """What names the client's session, where no header does."""
        return self.prompt_cache_key or self.user or ""

    def constraint(self) -> Constraint | None:
        """What ``response_format``, or one of vLLM's fields, asks for. Raises RequestError for what cannot be done."""
        return constraint_of_body({**(self.model_extra or {}), "response_format": self.response_format})

    def count_unknown(self, left_out: Counter[str]) -> None:
        """Count the unknown fields, which are ignored."""
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in _WITHOUT_EFFECT:
                count_left_out(left_out, name)

    def sampling(
        self,
        defaults: SamplingParams,
        *,
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        constraint: Constraint | None = None,
    ) -> list[SamplingParams]:
        """The parameters of each choice for one prompt; with a seed, choice i gets ``seed + i``, as a 64-bit integer.

        defaults: the model's, for fields that the request does not give.

        Raises RequestError when a value is out of range.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        top_k = 0 if self.top_k == -1 else self.top_k  # as vLLM writes that all tokens are kept
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "ignore_eos": self.ignore_eos,
            "min_tokens": self.min_tokens,
        }
        fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        fields |= {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
        first = replace(
            defaults,
            max_tokens=max_tokens,
            stop=tuple(filter(None, stop)),
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=self._biases(),
            constraint=constraint,
            **fields,
        )
        return [replace(first, seed=_nth_seed(first.seed, choice)) for choice in range(self.choices)]

    def _biases(self) -> dict[int, float]:
        biases = {}
        for name, bias in (self.logit_bias or {}).items():
            if not _TOKEN_ID.fullmatch(name):
                raise RequestError(f"logit_bias has {shown(name)}; it must have token ids", param="logit_bias")
            biases[int(name)] = bias
        return biases


def _nth_seed(seed: int | None, choice: int) -> int | None:
    """``seed + choice``; after the largest 64-bit integer comes the smallest."""
    return None if seed is None else (seed + choice + 2**63) % 2**64 - 2**63


class TemplateOptions(RequestBody):
    """How a conversation is rendered, beside its messages. chat_template_kwargs: variables for the chat template.

    add_generation_prompt: whether an answer is begun; true unless the final message is continued.
    continue_final_message: whether the answer goes on with the last message. reasoning_effort: a variable, too.
    """

    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    thinking: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None

    def conversation_of(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        tool_choice: object = None,
        *,
        parallel: bool = True,
    ) -> Conversation:
        """Messages and tools of the request with its options. Raises RequestError naming what cannot be used."""
        continued = bool(self.continue_final_message)
        if continued and self.add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt are both true; one of them must not be",
                param="continue_final_message",
            )
        reader = MessageReader()
        read = reader.messages(messages)
        functions = template_tools(tools, reader.left_out)
        return Conversation(
            read,
            functions,
            tool_choice_of(tool_choice, functions, parallel=parallel),
            self._variables(),
            left_out=reader.left_out,
            add_generation_prompt=not continued if self.add_generation_prompt is None else self.add_generation_prompt,
            continue_final_message=continued,
        )

    def _variables(self) -> dict[str, Any]:
        """Of the template. ``chat_template_kwargs`` come before the names that vendors have for the same."""
        variables: dict[str, Any] = {}
        effort = self.reasoning_effort or (self.reasoning or {}).get("effort")
        if isinstance(effort, str):
            variables["reasoning_effort"] = effort
        switch = (self.thinking or {}).get("type")
        if self.enable_thinking is not None:
            variables["enable_thinking"] = self.enable_thinking
        elif effort == "none" or switch == "disabled":
            variables["enable_thinking"] = False
        elif switch == "enabled":
            variables["enable_thinking"] = True
        return {**variables, **(self.chat_template_kwargs or {})}


class ChatCompletionRequest(TemplateOptions, OpenAIRequest):
    """The body of POST /v1/chat/completions. Messages are checked as they are rendered."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Integer | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    modalities: list[str] | None = None

    @model_validator(mode="after")
    def _functions_are_tools(self) -> Self:
        """Convert the deprecated fields for tools to the current ones."""
        if self.functions and not self.tools:
            self.tools = [{"type": "function", "function": function} for function in self.functions]
        return self

    def check(self) -> None:
        """Raises RequestError for what is not supported."""
        super().check()
        if "audio" in (self.modalities or ()):
            raise RequestError("modalities has 'audio'; it must be ['text']", param="modalities")

    @property
    def wanted_tokens(self) -> tuple[str, int | None]:
        """As for `OpenAIRequest`; ``max_completion_tokens`` comes before its former name."""
        if self.max_completion_tokens is None:
            return super().wanted_tokens
        return "max_completion_tokens", self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """Alternatives to report beside each token; None for no log-probabilities."""
        if self.top_logprobs and not self.logprobs:
            raise RequestError(
                f"top_logprobs is {self.top_logprobs} but logprobs is not true; set it, or leave both out",
                param="top_logprobs",
            )
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wants_function_call(self) -> bool:
        """Whether the request has the deprecated ``functions``, so that an answer has at most one ``function_call``."""
        return bool(self.functions)

    def conversation(self) -> Conversation:
        """Raises RequestError naming the place of what cannot be used."""
        former = self.function_call
        choice = {"type": "function", "function": former} if isinstance(former, dict) else former
        conversation = self.conversation_of(
            self.messages,
            self.tools or (),
            choice if self.tool_choice is None else self.tool_choice,
            parallel=self.parallel_tool_calls is not False and not self.wants_function_call,
        )
        left_out = Counter(conversation.left_out)
        self.count_unknown(left_out)
        return replace(conversation, left_out=left_out)


class CompletionRequest(OpenAIRequest):
    """The body of POST /v1/completions."""

    prompt: Any
    logprobs: Integer | None = None
    echo: bool | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as text or as token ids. Raises RequestError for any other form."""
        given = self.prompt
        many = isinstance(given, list) and bool(given) and isinstance(given[0], str | list)
        prompts: list[str | list[int]] = given if many else [given]
        for prompt in prompts:
            if not (isinstance(prompt, str) or _is_token_ids(prompt)):
                raise RequestError(
                    "prompt must be a string, a list of strings, a list of token ids (integers from 0), "
                    "or a list of such lists",
                    param="prompt",
                )
        if len(prompts) * self.choices > MAX_ANSWERS:
            raise RequestError(
                f"{len(prompts)} prompts with n = {self.choices} ask for {len(prompts) * self.choices} answers; "
                f"at most {MAX_ANSWERS} are accepted",
                param="prompt",
            )
        return prompts


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)
