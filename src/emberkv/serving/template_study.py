"""Measures how much of each turn's tokens the next turn's prompt can reuse, as far as the chat template decides it.

A sample conversation of an agent is rendered turn by turn: a question, two steps that each call a tool, an answer, and
a second question. The tokens of a turn are its prompt and its answer. The next turn's prompt is compared with them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from emberkv.engine.tokenization.tokenizer import Tokenizer
from emberkv.errors import RequestError
from emberkv.serving.api.conversation import Conversation

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], bool], str]
"""Renders messages; the flag is ``add_generation_prompt``."""

AGENT_TOKENS = 20_000
"""Approximate tokens of a coding agent's first prompt."""

TOOLS: Sequence[Mapping[str, Any]] = (
    {
        "type": "function",
        "function": {
            "name": "read_file",
            "description": "Read a file.",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string", "description": "Where it is."}},
                "required": ["path"],
            },
        },
    },
)


@dataclass(frozen=True, slots=True)
class Transition:
    """From one turn to the next.

    computed: tokens of the turn's prompt and answer. kept: how many of these are a prefix of the next prompt.
    differs_in: the message with the first difference, such as "answer 1"; empty if all are kept.
    """

    computed: int
    kept: int
    differs_in: str = ""

    @property
    def is_whole(self) -> bool:
        return not self.differs_in


@dataclass(frozen=True, slots=True)
class TemplateStudy:
    """The result for one template.

    steps: from each step of the tool loop to the next. question: from the answer to the user's next question. problem:
    why the template cannot render the conversation; there are no transitions then. shows_calls, shows_thoughts: whether
    the template renders the tool calls and the reasoning of the answer before the last tool result.
    """

    steps: tuple[Transition, ...] = ()
    question: Transition | None = None
    problem: str = ""
    shows_calls: bool = True
    shows_thoughts: bool = True

    @property
    def is_stable(self) -> bool:
        """Whether each prompt begins with all tokens of the turn before."""
        return all(each.is_whole for each in (*self.steps, self.question) if each is not None)

    @property
    def worst_step(self) -> Transition | None:
        """The step after which the most tokens have to be computed again."""
        return max(self.steps, key=lambda each: each.computed - each.kept, default=None)


def conversation(*, with_thoughts: bool) -> list[dict[str, Any]]:
    """The messages of the sample conversation, which ends with the second question."""

    def call(number: int, path: str) -> dict[str, Any]:
        call_id = f"call{number:05}"  # nine letters and digits, which Mistral's templates ask for
        return {
            "role": "assistant",
            "content": f"Step {number}: I read {path}.",
            "reasoning_content": f"The file {path} may say it.",
            "tool_calls": [
                {"id": call_id, "type": "function", "function": {"name": "read_file", "arguments": {"path": path}}}
            ],
        }

    def result(number: int, text: str) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": f"call{number:05}", "name": "read_file", "content": text}

    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You help with files. " * 8},
        {"role": "user", "content": "Which lamps are lit?"},
        call(1, "lamps.txt"),
        result(1, "See streets.txt."),
        call(2, "streets.txt"),
        result(2, "All lamps of Mill Lane are lit."),
        {"role": "assistant", "content": "Those of Mill Lane.", "reasoning_content": "Now I know it."},
        {"role": "user", "content": "And which are broken?"},
    ]
    if not with_thoughts:
        for message in messages:
            message.pop("reasoning_content", None)
    return messages


NAMES = (
    "system prompt", "question 1", "answer 1", "tool result 1", "answer 2", "tool result 2", "answer 3", "question 2",
)  # fmt: skip
"""The names of the conversation's messages in `Transition.differs_in`. Its tools count as part of the first."""


def study_template(render: Render, encode: Callable[[str], Sequence[int]], *, with_thoughts: bool) -> TemplateStudy:
    """Render the sample conversation turn by turn and compare.

    encode: text to token ids. If only the template is known, ``[ord(each) for each in text]`` compares characters.
    """
    messages = conversation(with_thoughts=with_thoughts)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        rest = _common_end(*(render(messages[: answers[which] + 1], False) for which in (0, -1)))
        transitions = [_transition(render, encode, messages, index, rest) for index in answers]
        within_loop = render(messages[: answers[1] + 2], True)
    except RequestError as error:
        return TemplateStudy(problem=str(error))
    return TemplateStudy(
        tuple(transitions[:-1]),
        transitions[-1],
        shows_calls=within_loop.count("path") > render(messages[:2], True).count("path"),
        shows_thoughts=not with_thoughts or "The file streets.txt may say it." in within_loop,
    )


def _transition(
    render: Render, encode: Callable[[str], Sequence[int]], messages: Sequence[Message], index: int, rest: int
) -> Transition:
    """From the turn with the answer ``messages[index]`` to the next. rest: length of the template's end of a turn."""
    prompt, answered = render(messages[:index], True), render(messages[: index + 1], False)
    following = render(messages[: index + 2], True)
    answer = answered[_common(prompt, answered) : len(answered) - rest]
    computed = prompt + answer
    kept = _common(encode(computed), encode(following))
    if _common(computed, following) == len(computed):
        return Transition(len(encode(computed)), len(encode(computed)))
    return Transition(len(encode(computed)), kept, _place(render, messages, index, computed, following))


def _place(render: Render, messages: Sequence[Message], index: int, computed: str, following: str) -> str:
    """The name of the message with the first difference: the first one whose rendered end lies after it."""
    differs = _common(computed, following)
    for last in range(index):
        try:
            reached = _common(render(messages[: last + 1], False), computed)
        except RequestError:  # templates may refuse a system prompt alone
            continue
        if reached > differs:
            return NAMES[last]
    return NAMES[index]


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _common_end(first: str, second: str) -> int:
    return _common(first[::-1], second[::-1])


def template_renderer(tokenizer: Tokenizer) -> Render:
    """A `Render` that renders messages as a request's messages are rendered."""

    def render(messages: Sequence[Message], is_answered: bool) -> str:
        return Conversation(messages, TOOLS, add_generation_prompt=is_answered).prompt_text(tokenizer)

    return render


def study_tokenizer(tokenizer: Tokenizer, *, with_thoughts: bool) -> TemplateStudy:
    """`study_template` with a model's own template and tokens."""

    def encode(text: str) -> Sequence[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    return study_template(template_renderer(tokenizer), encode, with_thoughts=with_thoughts)


def rewrites_turns(tokenizer: Tokenizer, *, reasons: bool) -> bool:
    """Whether the user's next question makes the chat template render earlier turns in another way.

    reasons: whether the model writes reasoning text.
    """
    if tokenizer.chat_problem is not None:
        return False
    studies = (study_tokenizer(tokenizer, with_thoughts=each) for each in ((True, False) if reasons else (False,)))
    return any(study.question is not None and not study.question.is_whole for study in studies)


def agent_warnings(tokenizer: Tokenizer, context: int, *, reasons: bool) -> list[str]:
    """Warnings about a model that coding agents would not work well with, one sentence each.

    context: tokens of the model's context. reasons: whether the model writes reasoning text. A template that ignores
    tools has its warning when it is loaded, and no further one here.
    """
    if tokenizer.chat_problem is not None:
        return []
    warnings: list[str] = []
    for with_thoughts in (True, False) if reasons else (False,):
        study = study_tokenizer(tokenizer, with_thoughts=with_thoughts)
        if study.problem:
            return [f"the chat template takes no tool calls and results: {study.problem}"]
        if not study.shows_calls:
            return []
        if not study.is_stable:
            warnings.append(_lost(study, with_thoughts))
            break
        if not study.shows_thoughts:
            warnings.append(
                "the chat template leaves out thoughts, so that each answer is computed again at the next turn"
            )
            break
    if context < AGENT_TOKENS:
        warnings.append(
            f"the context of {context:,} tokens is too small for coding agents, which begin with about {AGENT_TOKENS:,}"
        )
    return warnings


def _lost(study: TemplateStudy, with_thoughts: bool) -> str:
    transitions = {"the next step of a tool loop": study.worst_step, "the next question": study.question}
    lost = (f"at {name} from {each.differs_in} on" for name, each in transitions.items() if each and not each.is_whole)
    what = "turns with thoughts" if with_thoughts else "turns"
    return (
        f"the chat template writes earlier {what} anew, and these are computed again {' and '.join(lost)}; "
        "'emberkv explain --template' says more"
    )
