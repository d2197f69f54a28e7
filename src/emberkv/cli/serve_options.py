"""The options of ``emberkv serve``, each with its help.

None is "not given", which leaves it to ``EMBERKV_NAME`` in the environment and then to the default in `ServeConfig`; so
the defaults stand here as text.
"""

from pathlib import Path
from typing import Annotated

import typer

from emberkv.config import DEFAULT_PREFILL_CHUNK

ModelSource = Annotated[str | None, typer.Argument(help="A model folder or hub id; the bundled demo without one.")]
Host = Annotated[str | None, typer.Option(help="Address to listen on. (default: 127.0.0.1)")]
Port = Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one. (default: 8080)")]
ServedName = Annotated[str | None, typer.Option(help="What requests call the model.")]
CacheRam = Annotated[
    str | None, typer.Option(help="Size of the KV pool, such as 4GiB. (default: a quarter of the free memory)")
]
CacheDir = Annotated[
    Path | None, typer.Option(help="Folder that keeps blocks across restarts, and what else is to last.")
]
CacheDisk = Annotated[str | None, typer.Option(help="Most that the blocks in --cache-dir may take. (default: 50GiB)")]
RamTier = Annotated[str | None, typer.Option(help="Host memory for blocks that leave the KV pool. (default: none)")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16. (default: auto)")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps. (default: auto)")]
Kernels = Annotated[
    str | None, typer.Option(help="What computes on a CPU: auto, native (C++) or torch. (default: auto)")
]
Exact = Annotated[
    bool | None, typer.Option("--exact", help="Reuse only KV state that is bit-equal to a cold prefill's.")
]
PrefixCache = Annotated[
    bool | None, typer.Option("--prefix-cache/--no-prefix-cache", help="Reuse prefixes. (default: on)")
]
PrefillChunk = Annotated[int | None, typer.Option(help=f"Tokens per prefill pass. (default: {DEFAULT_PREFILL_CHUNK})")]
BlockSize = Annotated[int | None, typer.Option(help="Tokens per KV block. (default: 16)")]
MaxStepTokens = Annotated[int | None, typer.Option(help="Token budget of one step. (default: 256)")]
MaxRunning = Annotated[int | None, typer.Option(help="Requests that run at once. (default: 64)")]
Eviction = Annotated[str | None, typer.Option(help="lru, lfu, fifo, s3fifo or greedy-dual. (default: lru)")]
ApiKey = Annotated[
    list[str] | None, typer.Option(help="Accept this key; repeat for more. Other users see it in the process list.")
]
ApiKeyFile = Annotated[Path | None, typer.Option(help="Accept the keys in this file, one a line.")]
Tenants = Annotated[
    Path | None, typer.Option(help="YAML file of tenants: their keys, floors and quotas, and public prefixes.")
]
MaxBody = Annotated[str | None, typer.Option(help="Largest request body. (default: 16MiB)")]
MaxConnections = Annotated[int | None, typer.Option(help="Connections at once. (default: 1024)")]
DrainSeconds = Annotated[float | None, typer.Option(help="Patience when asked to stop. (default: 10)")]
Warmup = Annotated[
    bool | None, typer.Option("--warmup/--no-warmup", help="Compute system prompts before the start. (default: on)")
]
WarmupTimeout = Annotated[
    str | None, typer.Option(help="Seconds that readiness waits for the warmup, 1 to 300. (default: 60)")
]
WarmupSystemFile = Annotated[
    list[Path] | None, typer.Option(help="Warm this file's system prompt, not the built-in one; repeat for more.")
]
WarmupRequired = Annotated[
    bool | None, typer.Option("--warmup-required", help="Not ready before the system prompts are warm.")
]
AdminKey = Annotated[
    str | None, typer.Option(help="Key of the routes below /v1/cache; without any key, only this machine may use them.")
]
AdminKeyFile = Annotated[Path | None, typer.Option(help="File that holds the admin key.")]
MetricsKey = Annotated[
    str | None, typer.Option(help="Key of /metrics; without one, the admin key's if API keys are set, or else open.")
]
MetricsKeyFile = Annotated[Path | None, typer.Option(help="File that holds the metrics key.")]
Canonical = Annotated[Path | None, typer.Option(help="YAML file of rules that drop or move volatile lines of prompts.")]
RecordTrace = Annotated[
    Path | None, typer.Option(help="Write a trace of the requests to this new file: times and identities, no text.")
]
TraceUnit = Annotated[
    int | None, typer.Option(help="Tokens that have an identity in the trace. (default: as many as a block has)")
]
CorsOrigin = Annotated[
    list[str] | None,
    typer.Option(help="Web pages from this origin, such as https://example.com, may use the API; repeat for more."),
]
RootPath = Annotated[str | None, typer.Option(help="Path under which a proxy serves the API, such as /emberkv.")]
TlsCert = Annotated[Path | None, typer.Option(help="PEM file of the certificate to serve HTTPS with.")]
TlsKey = Annotated[Path | None, typer.Option(help="PEM file of the certificate's private key.")]
LogLevel = Annotated[str | None, typer.Option(help="debug, info, warning or error. (default: info)")]
LogFormat = Annotated[str | None, typer.Option(help="text or json. (default: text)")]
