"""System prompts that are warmed or public, rendered to the tokens that requests with them begin with."""

from collections.abc import Iterable, Sequence

from emberkv.config import ServeConfig
from emberkv.core.hashing import PUBLIC_OWNER
from emberkv.engine.system_prompt import prompt_or_built_in, read_system_prompt
from emberkv.engine.tokenization.shared_prefix import shared_prefix
from emberkv.engine.tokenization.tokenizer import Tokenizer
from emberkv.errors import ConfigError, RequestError
from emberkv.serving.canonical import CanonicalRules
from emberkv.serving.tenancy.tenants_file import PublicPrompt
from emberkv.serving.warmup.warm_prompt import WarmPrompt


def configured_prompts(config: ServeConfig) -> list[str]:
    """The texts of the system prompts to warm; none if nothing is to be warmed.

    Raises ConfigError for a file of ``config.warmup_system_files`` that is of no use.
    """
    if not config.warmup:
        return []
    if not config.warmup_system_files:
        return [prompt_or_built_in(config.warmup_fallback_file)]
    try:
        return [read_system_prompt(path.expanduser()) for path in config.warmup_system_files]
    except ConfigError as error:
        raise ConfigError(f"--warmup-system-file {error}") from error


def standard_prompts(
    texts: Sequence[str], tokenizer: Tokenizer, rules: CanonicalRules | None
) -> tuple[list[WarmPrompt], list[str]]:
    """What requests with these system prompts begin with; and why a prompt cannot be used with this model.

    They are public, so that what of them does not fill a block is found by all tenants as well.

    rules: which rewrite the system prompts of requests, and so these.
    """
    unique = dict.fromkeys(rules.of_system([text]).texts[0] if rules is not None else text for text in texts)
    prompts, problems = [], []
    for number, text in enumerate(unique, 1):
        try:
            prompts.append(WarmPrompt(tuple(shared_prefix(tokenizer, text)), PUBLIC_OWNER))
        except RequestError as error:
            problems.append(f"system prompt {number}: {error}")
    return prompts, problems


def public_tokens(
    declared: Iterable[PublicPrompt], tokenizer: Tokenizer, rules: CanonicalRules | None
) -> list[Sequence[int]]:
    """What `PublicPrefixes` is made of; prompts' files must have been read, as `read_tenants` does.

    rules: which rewrite the system prompts of requests, and so these. Raises ConfigError for a prompt that the model's
    chat template does not take.
    """
    tokens: list[Sequence[int]] = []
    for number, prompt in enumerate(declared):
        try:
            if prompt.system is not None:
                text = rules.of_system([prompt.system]).texts[0] if rules is not None else prompt.system
                tokens.append(shared_prefix(tokenizer, text))
            elif prompt.text is not None:
                tokens.append(tokenizer.encode(prompt.text, add_special_tokens=True))
        except RequestError as error:
            raise ConfigError(f"public_prefixes.{number} cannot be used with this model: {error}") from error
    return tokens
