"""Requests of the OpenAI API: their fields, which are refused, and their messages as chat templates take them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from pydantic_core import from_json

from emberkv.engine.request import MAX_TOP_LOGPROBS, SamplingParams
from emberkv.errors import RequestError
from emberkv.serving.api.conversation import Conversation, ToolChoice
from emberkv.serving.api.validation import RequestBody, plain_text

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}

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
    "function_call",
    "functions",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "include_stop_str_in_output",
    "logit_bias",
    "min_tokens",
    "prompt_embeds",
    "prompt_logprobs",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "stop_token_ids",
    "structured_outputs",
    "suffix",
    "truncate_prompt_tokens",
    "use_beam_search",
    "web_search_options",
)


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class OpenAIRequest(RequestBody):
    """What chat and plain completions have in common. ``top_k`` and the fields after it are extensions."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    best_of: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    response_format: dict[str, Any] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
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
        format_type = (self.response_format or {"type": "text"}).get("type")
        if format_type != "text":
            raise RequestError(
                f"response_format.type is {format_type!r}; only 'text' is supported", param="response_format"
            )

    def sampling(
        self,
        defaults: SamplingParams,
        *,
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> list[SamplingParams]:
        """The parameters of each choice for one prompt; with a seed, choice i gets ``seed + i``, as a 64-bit integer.

        defaults: the model's, for fields that the request does not give.

        Raises RequestError when a value is out of range.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "ignore_eos": self.ignore_eos,
        }
        fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        fields |= {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
        first = replace(defaults, max_tokens=max_tokens, stop=stop, seed=self.seed, **fields)
        return [replace(first, seed=_nth_seed(first.seed, choice)) for choice in range(self.choices)]


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

    def conversation_of(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[dict[str, Any]],
        tool_choice: ToolChoice,
    ) -> Conversation:
        """Messages and tools of the request with its options. Raises RequestError naming what cannot be used."""
        continued = bool(self.continue_final_message)
        if continued and self.add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt are both true; one of them must not be",
                param="continue_final_message",
            )
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return Conversation(
            template_messages(messages),
            without_marks(tools),
            tool_choice,
            {**effort, **(self.chat_template_kwargs or {})},
            add_generation_prompt=not continued if self.add_generation_prompt is None else self.add_generation_prompt,
            continue_final_message=continued,
        )


class ChatCompletionRequest(TemplateOptions, OpenAIRequest):
    """The body of POST /v1/chat/completions. Messages are checked as they are rendered."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

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
    def chosen_tools(self) -> ToolChoice:
        """Which tools the answer may call. Raises RequestError for 'required' and named tools."""
        if self.tool_choice not in (None, "none", "auto"):
            raise RequestError(
                f"tool_choice is {self.tool_choice!r}; only 'none' and 'auto' are supported",
                param="tool_choice",
            )
        mode: Literal["none", "auto"] = "none" if self.tool_choice == "none" else "auto"
        return ToolChoice(mode, parallel=self.parallel_tool_calls is not False)

    def conversation(self) -> Conversation:
        """Raises RequestError naming the place of what cannot be used."""
        return self.conversation_of(self.messages, self.tools or (), self.chosen_tools)


class CompletionRequest(OpenAIRequest):
    """The body of POST /v1/completions."""

    prompt: Any
    logprobs: int | None = None
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


def without_marks(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tools as the template is to show them: a mark that says how long to retain the prefix is no part of one."""
    return [{key: value for key, value in tool.items() if key != "cache_control"} for tool in tools]


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose content is a string, for ``Tokenizer.render_chat``.

    Text parts are joined by line breaks; "developer" is shown as "system"; a tool call's arguments become an
    object, as templates expect. Raises RequestError naming the place of what cannot be used.
    """
    if not messages:
        raise RequestError("messages is empty; it must hold at least one message", param="messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        accepted = ", ".join(repr(known) for known in _ROLES)
        raise RequestError(f"{place}.role is {role!r}; it must be one of {accepted}", param=f"{place}.role")
    calls = message.get("tool_calls")
    plain: dict[str, Any] = {"role": _ROLES[role]}
    if message.get("content") is None and role == "assistant" and calls:
        plain["content"] = ""
    else:
        plain["content"] = plain_text(message.get("content"), f"{place}.content")
    if calls:
        if not isinstance(calls, list):
            raise RequestError(f"{place}.tool_calls must be a list", param=f"{place}.tool_calls")
        plain["tool_calls"] = [_call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(calls)]
    for name in ("name", "tool_call_id"):
        if isinstance(message.get(name), str):
            plain[name] = message[name]
    return plain


def _call(call: object, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f"{place} must be an object with function.name and function.arguments", param=place)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = from_json(arguments or "{}")
        except ValueError as error:
            raise RequestError(
                f"{place}.function.arguments is not valid JSON: {error}", param=f"{place}.function.arguments"
            ) from error
    plain_function = {"name": function["name"], "arguments": arguments}
    return {"id": call.get("id"), "type": "function", "function": plain_function}
