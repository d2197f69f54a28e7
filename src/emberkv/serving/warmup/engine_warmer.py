"""Connects a warmup to the engine: its commands and requests, and how a server's warmup is made."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from emberkv.core.hashing import PUBLIC_OWNER, BlockHash, Chain
from emberkv.core.sequence import BACKGROUND_PRIORITY
from emberkv.engine.commands import CachedTokens, Command, Retain, Unretain
from emberkv.engine.request import GenerationRequest, OutputListener, SamplingParams
from emberkv.errors import EngineStoppedError
from emberkv.serving.tenancy.tenants import Tenants
from emberkv.serving.warmup.warm_prompt import WarmPrompt, kept_hashes

if TYPE_CHECKING:
    from emberkv.engine.loop import EngineLoop
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from emberkv.config import ServeConfig
from emberkv.serving.background import Background
from emberkv.serving.warmup.learned_prompts import LearnedPrompts
from emberkv.serving.warmup.warmup import Warmup, WarmupSettings

if TYPE_CHECKING:
    from emberkv.engine.assembly import AssembledEngine


_ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
_PATIENCE_SECONDS = 30.0

R = TypeVar("R")


class EngineWarmer:
    """The `WarmEngine` over an engine's loop. The prompts of no tenant are the operator's, and unsalted.

    block_size: tokens.
    """

    def __init__(self, loop: "EngineLoop", tenants: Tenants, *, block_size: int) -> None:
        self._loop = loop
        self._tenants = tenants
        self._block_size = block_size

    def chain(self, prompt: WarmPrompt) -> Chain:
        """Raises UnknownTenantError."""
        return self._loop.chain(self._request(prompt, ""))

    def cached_tokens(self, chain: Chain) -> int:
        return self._ask(CachedTokens(chain))

    def keep(self, chain: Chain) -> None:
        self._ask(Retain(kept_hashes(chain)))

    def unretain(self, block_hashes: Iterable[BlockHash]) -> None:
        self._ask(Unretain(tuple(block_hashes)))

    def room(self) -> int:
        stats = self._loop.stats()
        return (stats.free_blocks - stats.cached_blocks) * self._block_size

    def compute(self, prompt: WarmPrompt, request_id: str, listener: OutputListener) -> None:
        self._loop.submit(self._request(prompt, request_id), listener)

    def abort(self, request_id: str) -> None:
        self._loop.abort(request_id)

    def _request(self, prompt: WarmPrompt, request_id: str) -> GenerationRequest:
        is_operators = prompt.tenant in ("", PUBLIC_OWNER)
        salt = b"" if is_operators else self._tenants.named(prompt.tenant).salt
        return GenerationRequest(
            request_id, prompt.tokens, _ONE_TOKEN, salt, priority=BACKGROUND_PRIORITY, tenant=prompt.tenant
        )

    def _ask(self, command: Command[R]) -> R:
        try:
            return self._loop.execute(command).result(_PATIENCE_SECONDS)
        except TimeoutError as error:
            raise EngineStoppedError(f"the engine gave no answer within {_PATIENCE_SECONDS:g} s") from error


def make_warmup(
    config: ServeConfig,
    engine: "AssembledEngine",
    tenants: Tenants,
    prompts: Sequence[WarmPrompt],
    problems: Sequence[str],
    *,
    on_ready: Callable[[], None],
    background: Background,
) -> Warmup:
    """The warmup of ``prompts``, which watches the engine from now on and is not started yet.

    problems: why others are no prompts. on_ready: see `Warmup`. What use teaches is kept in ``config.cache_dir``.
    Without a prefix cache nothing is warmed.
    """
    warmer = EngineWarmer(engine.loop, tenants, block_size=engine.block_size)
    settings = WarmupSettings(
        config.warmup and config.prefix_cache,
        config.warmup_timeout,
        config.warmup_required,
        engine.hit_unit,
        engine.block_size,
    )
    if not settings.enabled:
        prompts, problems = (), ()
    learned = None
    if config.cache_dir is not None:
        learned = LearnedPrompts(config.cache_dir, engine.root, warmer.chain)
    warmup = Warmup(warmer, settings, prompts, problems=problems, learned=learned, on_ready=on_ready)
    engine.loop.on_update(background.work("warmup").guarded(warmup.on_update))
    return warmup
