"""System prompts that are warmed or public, rendered to the tokens that requests with them begin with."""

from collections.abc import Iterable, Sequence

from emberkv.config import ServeConfig
from emberkv.core.hashing import PUBLIC_OWNER
from emberkv.engine.tokenization.tokenizer import Tokenizer, shared_prefix
from emberkv.engine.warmup import prompt_or_built_in, read_system_prompt
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


def render_system_prompt(text: str, tokenizer: Tokenizer, rules: CanonicalRules | None) -> list[int]:
    """The tokens that all requests with a system prompt begin with, once ``rules`` have rewritten it as they do theirs.

    Raises RequestError for a prompt that the model's chat template does not take.
    """
    return shared_prefix(tokenizer, text if rules is None else rules.of_system([text]).texts[0])


def standard_prompts(
    texts: Sequence[str], tokenizer: Tokenizer, rules: CanonicalRules | None
) -> tuple[list[WarmPrompt], list[str]]:
    """These system prompts to warm, each once, and why others cannot be used with this model.

    They are public, so that all tenants also find the end of one that does not fill a block.
    """
    prompts, problems = [], []
    for number, text in enumerate(dict.fromkeys(texts), 1):
        try:
            prompts.append(WarmPrompt(tuple(render_system_prompt(text, tokenizer, rules)), PUBLIC_OWNER))
        except RequestError as error:
            problems.append(f"system prompt {number}: {error}")
    return list(dict.fromkeys(prompts)), problems


def public_tokens(
    declared: Iterable[PublicPrompt], tokenizer: Tokenizer, rules: CanonicalRules | None
) -> list[Sequence[int]]:
    """The token sequences for `PublicPrefixes`. The files of the prompts have been read, as `read_tenants` does.

    Raises ConfigError for a prompt that the model's chat template does not take.
    """
    tokens: list[Sequence[int]] = []
    for number, prompt in enumerate(declared):
        try:
            if prompt.system is not None:
                tokens.append(render_system_prompt(prompt.system, tokenizer, rules))
            elif prompt.text is not None:
                tokens.append(tokenizer.encode(prompt.text, add_special_tokens=True))
        except RequestError as error:
            raise ConfigError(f"public_prefixes.{number} cannot be used with this model: {error}") from error
    return tokens
