"""The operator's system prompts, as the tokens that requests with them begin with."""

from collections.abc import Sequence
from pathlib import Path

from emberkv.engine.shared_prefix import shared_prefix
from emberkv.engine.system_prompt import get_standard_system_prompt
from emberkv.engine.tokenizer import Tokenizer
from emberkv.errors import RequestError
from emberkv.serving.canonical.rules import CanonicalRules
from emberkv.serving.warmup.warm_prompt import WarmPrompt


def standard_prompts(
    files: Sequence[Path] | None, tokenizer: Tokenizer, rules: CanonicalRules | None = None
) -> tuple[list[WarmPrompt], list[str]]:
    """One prompt a file, or the built-in one if there are no files; and why a prompt cannot be used with this model.

    files: None for no prompts at all. rules: which rewrite the system prompts of requests, and so these.
    """
    if files is None:
        return [], []
    texts = dict.fromkeys(map(get_standard_system_prompt, files or (None,)))
    if rules is not None:
        texts = dict.fromkeys(rules.of_system([text]).texts[0] for text in texts)
    prompts, problems = [], []
    for number, text in enumerate(texts, 1):
        try:
            prompts.append(WarmPrompt(tuple(shared_prefix(tokenizer, text))))
        except RequestError as error:
            problems.append(f"system prompt {number}: {error}")
    return prompts, problems
