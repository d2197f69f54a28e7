"""Number types of descriptions, bounded so that every run is bounded in memory.

A number beyond them is an error that names it. They are far above anything a model serves today.
"""

from typing import Annotated

from pydantic import Field

MOST_TOKENS = 2**24
"""Tokens of a prompt, an answer, a block or a step."""

MOST_SECONDS = 9e9
"""Seconds of virtual time, which is counted in nanoseconds of 63 bits: 285 years."""

MOST_CONVERSATIONS = 100_000_000
MOST_TURNS = 100_000
MOST_PROMPTS = 1_000_000
MOST_REPLICAS = 4096
MOST_BLOCKS = 2**26
"""KV blocks of all replicas together; each takes some 200 bytes while it is simulated."""

Tokens = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
SomeTokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
Seconds = Annotated[float, Field(ge=0, le=MOST_SECONDS)]
SomeSeconds = Annotated[float, Field(gt=0, le=MOST_SECONDS)]
Rate = Annotated[float, Field(ge=1e-9, le=1e9)]
"""Events a second."""

Amount = Annotated[float, Field(ge=0, le=1e12)]
"""A parameter of a distribution of tokens, seconds or turns."""

SomeAmount = Annotated[float, Field(gt=0, le=1e12)]
