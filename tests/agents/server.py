"""The serving app over a real engine whose answers a script gives, for the requests of coding agents."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from emberkv.core.explaining.ledger import Ledger
from emberkv.core.hashing import root_hash
from emberkv.engine.assembly import EngineConfig, assemble_around
from emberkv.engine.constraints import ConstraintCompiler
from emberkv.engine.request import ModelLimits
from emberkv.engine.torch.model.loader import load_tokenizer
from emberkv.serving.app import ServingSettings
from emberkv.serving.cache.ledger_store import LedgerStore
from emberkv.serving.cache.service import cache_service
from emberkv.serving.canonical import rules_in_force
from emberkv.serving.lifecycle import Lifecycle, ServedModel, chosen_output_format, model_names
from emberkv.serving.template_study import rewrites_turns
from tests.scripted import ChainExecutor, ScriptedExecutor
from tests.serving.parsing.families import FAMILIES, Family

MODEL = "scripted"
CONTEXT = 131_072
BLOCK = 16
VOCAB = 4096
END = "<|end|>"
FAMILY = replace(FAMILIES["Qwen3"], turn="<|assistant|>", end=END)
"""Writes calls and thoughts as Qwen3 does, and a turn between special tokens of the demonstration model's tokenizer."""
KEEPS_THOUGHTS = replace(FAMILY, keeps="all")
"""A template that renders earlier turns as they were, so that nothing of them is computed twice."""

TextScript = Callable[[str], str]
"""From a prompt's text to its answer's."""


@contextmanager
def scripted_model(script: TextScript, folder: Path, family: Family = FAMILY) -> Iterator[ServedModel]:
    """A model with the demonstration model's tokenizer, the family's template and the script's answers.

    folder: for the template's file.
    """
    template = folder / "template.jinja"
    template.write_text(family.template)
    tokenizer = load_tokenizer(str(files("emberkv") / "demo_model"), str(template))
    (end,) = tokenizer.encode(END, add_special_tokens=False)

    pieces = list(map(tokenizer.token_bytes, range(VOCAB)))

    def answer(prompt: Sequence[int]) -> list[int]:
        text = b"".join(map(pieces.__getitem__, prompt)).decode()
        return [*tokenizer.encode(script(text), add_special_tokens=False), end]

    blocks = 2 * CONTEXT // BLOCK
    executor = ScriptedExecutor(ChainExecutor(num_blocks=blocks, block_size=BLOCK, vocab=VOCAB), answer)
    constraints = ConstraintCompiler(tokenizer, vocab_size=VOCAB, eos_token_ids=frozenset({end}))
    engine = assemble_around(
        executor,
        EngineConfig(0, BLOCK, prefill_chunk=2048, max_step_tokens=2048),
        limits=ModelLimits(CONTEXT, VOCAB, frozenset({end})),
        root=root_hash(MODEL, BLOCK),
        namespace=bytes(32),
        constraints=constraints,
    )
    cache = cache_service(engine, LedgerStore(Ledger()), name=MODEL)
    names, patterns = model_names([], MODEL, strict=False)
    engine.loop.start()
    try:
        yield ServedModel(
            names,
            1_700_000_000,
            engine.loop,
            tokenizer,
            cache=cache,
            public=engine.public,
            assembled=engine,
            output_format=chosen_output_format(tokenizer, "auto", "auto"),
            name_patterns=patterns,
            rewrites_turns=rewrites_turns(tokenizer, reasons=True),
        )
    finally:
        engine.close()
        constraints.close()


def scripted_lifecycle(model: ServedModel) -> Lifecycle:
    lifecycle = Lifecycle()
    lifecycle.loaded(model)
    return lifecycle


def agent_settings(next_turn_tokens: int = 0) -> ServingSettings:
    """Those of a server's start: agents' volatile lines are dropped.

    next_turn_tokens: how many tokens of next prompts are computed in a minute while the server is idle.
    """
    return ServingSettings(canonical=rules_in_force(None, for_agents=True), next_turn_tokens=next_turn_tokens)
