"""What a tenant learns by asking for another one's prompts: nothing, by count, by explanation or by cost.

A prompt that another tenant has cached (a probe) and one that no tenant has (a control) are asked for, many times and
in random order. Cost is counted, in tokens and blocks, so that the outcome does not depend on the machine.
"""

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.rank_test import auc, p_value

from emberkv.core.explaining.ledger import Ledger
from emberkv.core.policies.fair_shares import Share
from emberkv.engine.assembly import AssembledEngine, EngineConfig
from emberkv.engine.commands import Statistics
from emberkv.engine.torch.assembly import assemble
from emberkv.engine.torch.attention.paged_attention import ATTENTION_NAME
from emberkv.engine.torch.model.loader import LoadedModel as ModelOnDevice
from emberkv.engine.torch.model.loader import load_model
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.serving.app import ServingSettings, create_app
from emberkv.serving.cache.ledger_store import LedgerStore
from emberkv.serving.cache.service import cache_service
from emberkv.serving.lifecycle import Lifecycle, ServedModel
from emberkv.serving.tenancy import Tenants
from emberkv.tiers.kinds import TierConfig, TierSpec
from tests.conftest import CheckpointFactory
from tests.machine import MACHINE_CACHE
from tests.models import VOCAB_SIZE
from tests.serving.harness import MODEL, Client
from tests.waiting import DEADLINE

KEYS = ("victim-key", "prober-key")
PUBLIC_TOKENS, PRIVATE_TOKENS = 64, 160
PROBES = 24


@dataclass
class Seen:
    """views: all that responses said. costs: what each request added to each counter."""

    views: list[dict[str, Any]] = field(default_factory=list)
    costs: list[dict[str, int]] = field(default_factory=list)

    def cost(self, name: str) -> list[int]:
        return [each.get(name, 0) for each in self.costs]


class Service:
    """A server with two tenants, asked one prompt at a time."""

    def __init__(self, engine: AssembledEngine, model: ModelOnDevice) -> None:
        self.engine = engine
        lifecycle = Lifecycle()
        self.cache = cache_service(engine, LedgerStore(Ledger()), name=MODEL)
        lifecycle.loaded(ServedModel((MODEL,), 0, engine.loop, model.tokenizer, cache=self.cache))
        settings = ServingSettings(tenants=Tenants(KEYS, secret=b"server secret"), admin_key="admin-key")
        self.client = Client(create_app(lifecycle, settings))

    def ask(self, key: str, prompt: list[int]) -> tuple[dict[str, Any], dict[str, int]]:
        """What the response says of the cache, an explanation asked for before included; and the response's cost."""
        headers = {"authorization": f"Bearer {key}"}
        explained = self.client.post("/v1/cache/explain", {"openai": {"prompt": prompt}}, headers=headers)
        before = self.counters()
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 2, "temperature": 0}
        answer = self.client.post("/v1/completions", body, headers=headers)
        after = self.counters()
        assert (explained.status_code, answer.status_code) == (200, 200)
        view = {"explained": explained.json(), "header": answer.headers["x-emberkv-cache"], **answer.json()["usage"]}
        return view, {name: count - before.get(name, 0) for name, count in after.items()}

    def counters(self) -> dict[str, int]:
        """Everything that the engine and its tiers count: steps' tokens, blocks touched, loads, stores, evictions."""
        counters = self.engine.loop.execute(Statistics()).result(DEADLINE).counters
        stats = {each.name: getattr(counters, each.name) for each in fields(counters)}
        assert self.engine.tiers is not None
        assert self.engine.tiers.flush(DEADLINE)
        for tier, figures in self.engine.tiers.stats().items():
            stats.update({f"{tier} {name}": getattr(figures, name) for name in TIER_COUNTERS})
            stats[f"{tier} skipped"] = sum(figures.skipped.values())
        return {name: count for name, count in _flat(stats) if isinstance(count, int)}


TIER_COUNTERS = ("hits", "misses", "loads", "stores", "evictions")


def _flat(stats: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, count in stats.items():
        if isinstance(count, Mapping):
            yield from ((f"{name} {kind}", each) for kind, each in count.items())
        else:
            yield name, count


@pytest.fixture(scope="module")
def model(checkpoint: CheckpointFactory) -> ModelOnDevice:
    return load_model(str(checkpoint("llama")), dtype="float32", device="cpu", attn_implementation=ATTENTION_NAME)


@contextmanager
def service(
    model: ModelOnDevice, config: EngineConfig, public: list[int], *, with_kernels: bool = True
) -> Iterator[Service]:
    """with_kernels: hits end at any token; without, at tiles of 32, and computing takes three times as long."""
    own = replace(model, model=copy.deepcopy(model.model))
    kernels = Kernels.built(MACHINE_CACHE) if with_kernels else None
    engine = assemble(own, config, kernels=kernels, public_prefixes=[public])
    found = Service(engine, model)
    engine.loop.start()
    try:
        yield found
    finally:
        engine.close()


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(10, VOCAB_SIZE) for _ in range(count)]


def probe(service: Service, public: list[int], *, asked_with: str = KEYS[1]) -> tuple[Seen, Seen]:
    """The prober's probes and controls, a victim's prompts being warm. asked_with: the prober's key.

    Each prompt's first private token is another one, so that all diverge from one another there.
    """
    rng = random.Random(1)
    prompts = [[*public, first, *tokens(rng, PRIVATE_TOKENS - 1)] for first in range(10, 10 + 2 * PROBES)]
    rng.shuffle(prompts)
    warm = prompts[:PROBES]
    for prompt in warm:
        service.ask(KEYS[0], prompt)
    rng.shuffle(prompts)
    service.ask(asked_with, [*public, *[VOCAB_SIZE - 1] * PRIVATE_TOKENS])
    seen = (Seen(), Seen())
    for prompt in prompts:
        view, cost = service.ask(asked_with, prompt)
        kind = seen[prompt not in warm]
        kind.views.append(view)
        kind.costs.append(cost)
    return seen


def counters(*seen: Seen) -> list[str]:
    return sorted({name for each in seen for cost in each.costs for name in cost})


def without_texts(view: dict[str, Any]) -> dict[str, Any]:
    """A view but for the texts around a divergence: which of the asker's own prompts is nearest differs by prompt."""
    divergence = {**view["explained"]["divergence"], "expected": "", "found": ""}
    return {**view, "explained": {**view["explained"], "divergence": divergence}}


ROOMY = EngineConfig(cache_bytes=2**25, block_size=16, prefill_chunk=32, tiers=TierConfig((TierSpec("ram", 2**26),)))


@pytest.fixture
def public() -> list[int]:
    return tokens(random.Random(0), PUBLIC_TOKENS)


def test_a_partial_block_behind_a_public_prefix_is_its_tenants(model: ModelOnDevice, public: list[int]) -> None:
    prompt = [*public, *tokens(random.Random(1), 9)]
    with service(model, ROOMY, public) as server:
        cached = [server.ask(key, prompt)[1]["hit_tokens"] for key in (KEYS[0], KEYS[1], KEYS[0], KEYS[1])]
    assert cached == [0, PUBLIC_TOKENS, len(prompt) - 1, len(prompt) - 1]


def test_no_look_up_for_other_sizes_is_left_when_an_answer_has_gone_out(
    model: ModelOnDevice, public: list[int]
) -> None:
    with service(model, ROOMY, public) as server:
        for _ in range(3):
            server.ask(KEYS[0], public)
        assert server.cache.reuse is not None
        assert server.cache.reuse.waiting == 0


@pytest.mark.parametrize("with_kernels", [True, False])
def test_a_probe_looks_and_costs_as_a_control_does(
    model: ModelOnDevice, tmp_path: Path, public: list[int], with_kernels: bool
) -> None:
    config = replace(ROOMY, tiers=TierConfig((TierSpec("ram", 2**26), TierSpec("disk", 2**26, tmp_path))))
    with service(model, config, public, with_kernels=with_kernels) as server:
        probes, controls = probe(server, public)
    first, *others = map(without_texts, probes.views + controls.views)
    assert all(view == first for view in others)
    assert first["prompt_tokens_details"]["cached_tokens"] == PUBLIC_TOKENS
    assert first["explained"]["divergence"]["token"] == PUBLIC_TOKENS
    figures = counters(probes, controls)
    assert {"prefill_tokens", "hit_tokens", "committed_blocks", "ram stores", "disk misses"} <= set(figures)
    assert {name: sorted(probes.cost(name)) for name in figures} == {
        name: sorted(controls.cost(name)) for name in figures
    }


def test_the_nearest_prompt_that_is_told_is_ones_own(model: ModelOnDevice, public: list[int]) -> None:
    with service(model, ROOMY, public) as server:
        probes, controls = probe(server, public)
    divergences = [view["explained"]["divergence"] for view in probes.views + controls.views]
    own = {each["found"] for each in divergences}
    expected = {each["expected"] for each in divergences} - own
    assert len(expected) == 1, "only the prober's very first prompt was never reported as found"


def test_where_space_is_short_a_rank_test_finds_no_difference(
    model: ModelOnDevice, tmp_path: Path, public: list[int]
) -> None:
    floor = Share(floor_bytes=2**18)
    shares = {tier: {**dict.fromkeys(names(), floor), "public": floor} for tier in ("pool", "ram", "disk")}
    tiers = TierConfig((TierSpec("ram", 2**21), TierSpec("disk", 2**21, tmp_path)), shares=shares)
    with service(model, replace(ROOMY, cache_bytes=2**21, tiers=tiers), public) as server:
        probes, controls = probe(server, public)
    assert {view["header"] for view in probes.views} == {view["header"] for view in controls.views}
    costs = {name: (probes.cost(name), controls.cost(name)) for name in counters(probes, controls)}
    for name, both in costs.items():
        assert p_value(*both, random.Random(2)) > 0.05, name
    assert sum(map(sum, costs["evicted_blocks"])) > 100
    assert sum(map(sum, costs["disk evictions"])) > 100


def test_the_same_tests_do_tell_ones_own_warm_prompts_apart(model: ModelOnDevice, public: list[int]) -> None:
    with service(model, ROOMY, public) as server:
        probes, controls = probe(server, public, asked_with=KEYS[0])
    assert {view["header"] for view in probes.views}.isdisjoint(view["header"] for view in controls.views)
    computed = probes.cost("prefill_tokens"), controls.cost("prefill_tokens")
    assert auc(*computed) == 1
    assert p_value(*computed, random.Random(2)) < 0.001


def test_within_its_floor_a_tenant_cannot_tell_what_another_does(
    model: ModelOnDevice, tmp_path: Path, public: list[int]
) -> None:
    """The same requests of one tenant, with another one idle and with it flooding all tiers."""
    views = []
    for flood in (0, 5):
        floor = Share(floor_bytes=2**20)
        shares = {tier: dict.fromkeys(names()[1:], floor) for tier in ("pool", "ram", "disk")}
        tiers = TierConfig((TierSpec("ram", 2**21), TierSpec("disk", 2**21, tmp_path / str(flood))), shares=shares)
        rng = random.Random(3)
        own = [tokens(rng, 200) for _ in range(3)] * 3
        with service(model, replace(ROOMY, cache_bytes=2**21, tiers=tiers), public) as server:
            seen = []
            for prompt in own:
                seen.append(server.ask(KEYS[1], prompt)[0])
                for _ in range(flood):
                    server.ask(KEYS[0], tokens(rng, 300))
        views.append(seen)
    assert views[0] == views[1]
    assert [view["prompt_tokens_details"]["cached_tokens"] for view in views[0]] == [0] * 3 + [199] * 6


def names() -> list[str]:
    return Tenants(KEYS, secret=b"").names
