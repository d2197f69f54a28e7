"""Public prefixes, as the tokens that prompts with them begin with."""

from collections.abc import Iterable, Sequence

from emberkv.engine.shared_prefix import shared_prefix
from emberkv.engine.tokenizer import Tokenizer
from emberkv.errors import ConfigError, RequestError
from emberkv.serving.canonical.rules import CanonicalRules
from emberkv.serving.tenancy.tenants_file import PublicPrompt


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
