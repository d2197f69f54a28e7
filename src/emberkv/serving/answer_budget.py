"""How many tokens an answer may have: as many as are wanted, as far as they fit behind the prompt."""

from dataclasses import dataclass

from emberkv.errors import PromptTooLongError, RequestError
from emberkv.serving.lifecycle import ServedModel


@dataclass(frozen=True, slots=True)
class AnswerBudget:
    """tokens: the most that an answer may have. is_clipped: the request asked for more than fits."""

    tokens: int
    is_clipped: bool = False


def answer_budget(
    model: ServedModel, prompt_tokens: int, wanted: int | None, *, field: str = "max_tokens"
) -> AnswerBudget:
    """How many tokens an answer may have: as many as are ``wanted`` by the request's ``field``, as far as they fit.

    Raises PromptTooLongError for a prompt that does not fit, and where the model refuses what does not fit, for more
    tokens than do; RequestError for a prompt that is empty.
    """
    engine = model.engine
    if prompt_tokens == 0:
        raise RequestError("the prompt is empty; it must have at least one token", param="prompt")
    if prompt_tokens > engine.max_prompt_tokens:
        raise PromptTooLongError(
            f"the prompt has {prompt_tokens} tokens; at most {engine.max_prompt_tokens} are accepted",
            prompt_tokens=prompt_tokens,
            limit=engine.max_prompt_tokens,
        )
    remaining = engine.context_length - prompt_tokens
    if wanted is None or wanted <= remaining:
        return AnswerBudget(remaining if wanted is None else wanted)
    if model.on_overflow == "clip":
        return AnswerBudget(remaining, is_clipped=True)
    raise PromptTooLongError(
        f"{field} is {wanted}; after a prompt of {prompt_tokens} tokens, the context of {engine.context_length} tokens "
        f"has at most {remaining} left",
        param=field,
        prompt_tokens=prompt_tokens,
        wanted=wanted,
        limit=engine.context_length,
    )
