"""The options of ``emberkv serve``, each with its help.

None is "not given", which leaves it to ``EMBERKV_NAME`` in the environment and then to the default in `ServeConfig`; so
the defaults stand here as text. Paths and sizes are text, too: `ServeConfig` checks them, wherever they come from.
"""

from pathlib import Path
from typing import Annotated

import typer

from emberkv.defaults import DEFAULT_PREFILL_CHUNK

MODEL, CACHE, SCHEDULING, SERVER, ACCESS, WARMUP, LOGS, CONFIGURATION, CLUSTER = (
    "Model", "Cache", "Scheduling", "Server", "Access", "Warmup", "Logs", "Configuration", "Cluster"
)  # fmt: skip
"""Headings of the help."""

ModelSource = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="A model folder or hub id; the bundled demo without one.")
]
Host = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", rich_help_panel=SERVER, help="Address to listen on. (default: 127.0.0.1)"),
]
Port = Annotated[
    int | None, typer.Option(rich_help_panel=SERVER, help="Port to listen on; 0 takes a free one. (default: 8080)")
]
ServedName = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=MODEL,
        help="Model name in requests; repeat for more. 'claude-*' is any name that begins so.",
    ),
]
StrictNames = Annotated[
    bool | None,
    typer.Option(
        "--strict-names/--any-agent-names",
        rich_help_panel=MODEL,
        help="Refuse coding agents' names for their vendor's models, such as claude-haiku-4-5. (default: answer them)",
    ),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        rich_help_panel=MODEL,
        help="One of the model's chat templates, or a file. (default: its own)",
    ),
]
ToolParser = Annotated[
    str | None,
    typer.Option(
        metavar="auto|none|NAME",
        rich_help_panel=MODEL,
        help="Format in which the model writes tool calls, such as hermes. (default: as its chat template shows)",
    ),
]
ReasoningParser = Annotated[
    str | None,
    typer.Option(
        metavar="auto|none|NAME",
        rich_help_panel=MODEL,
        help="Format in which the model writes thoughts, such as think. (default: as its chat template shows)",
    ),
]
GenerationConfig = Annotated[
    str | None,
    typer.Option(
        metavar="auto|ignore",
        rich_help_panel=MODEL,
        help="Whether the model's generation_config.json sets defaults of sampling. (default: auto)",
    ),
]
CacheRam = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        rich_help_panel=CACHE,
        help="Size of the KV pool, such as 4GiB. (default: a quarter of the free memory, at most 8 contexts)",
    ),
]
CacheDir = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", rich_help_panel=CACHE, help="Folder that keeps cached blocks across restarts."),
]
CacheDisk = Annotated[
    str | None,
    typer.Option(metavar="SIZE", rich_help_panel=CACHE, help="Limit of the blocks in --cache-dir. (default: 50GiB)"),
]
RamTier = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", rich_help_panel=CACHE, help="Host memory for blocks that leave the KV pool. (default: none)"
    ),
]
ShmTier = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        rich_help_panel=CACHE,
        help="Host memory for blocks that all servers of this machine and user share. (default: none)",
    ),
]
RemoteTier = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        rich_help_panel=CACHE,
        help="Redis or Valkey server that machines share blocks through: redis://HOST:6379; or Mooncake's master, "
        "mooncake://HOST:50051. (default: none)",
    ),
]
RemoteTierBytes = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        rich_help_panel=CACHE,
        help="Limit of all blocks in --remote-tier; of a Mooncake "
        "store, the memory that this server gives to it. (default: 8GiB)",
    ),
]
RemoteTierTtl = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS", rich_help_panel=CACHE, help="How long it keeps a block that is not used. (default: 86400)"
    ),
]
RemoteTierPasswordFile = Annotated[
    str | None, typer.Option(metavar="FILE", rich_help_panel=CACHE, help="File that holds the server's password.")
]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="NAME", rich_help_panel=MODEL, help="auto, float32, bfloat16 or float16. (default: auto)"),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=MODEL,
        help="Round a plain checkpoint's weights: none, int8 or int4. (default: none)",
    ),
]
KVDtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=CACHE,
        help="Of keys and values in the pool and the tiers: auto, or int8, which takes half the bytes. (default: auto)",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", rich_help_panel=MODEL, help="auto, cpu, cuda, cuda:N or mps. (default: auto)"),
]
Kernels = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", rich_help_panel=MODEL, help="CPU kernels: auto, native (C++) or torch. (default: auto)"
    ),
]
SelfCheck = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=MODEL,
        help="Try out the model at the start: auto, unless it has passed before, or always. (default: auto)",
    ),
]
Exact = Annotated[
    bool | None,
    typer.Option("--exact", rich_help_panel=CACHE, help="Reuse only KV state that is bit-equal to a cold prefill's."),
]
PrefixCache = Annotated[
    bool | None,
    typer.Option(
        "--prefix-cache/--no-prefix-cache", rich_help_panel=CACHE, help="Reuse cached prefixes. (default: on)"
    ),
]
PrefillChunk = Annotated[
    int | None,
    typer.Option(rich_help_panel=SCHEDULING, help=f"Tokens per prefill pass. (default: {DEFAULT_PREFILL_CHUNK})"),
]
BlockSize = Annotated[int | None, typer.Option(rich_help_panel=CACHE, help="Tokens per KV block. (default: 16)")]
MaxStepTokens = Annotated[
    int | None, typer.Option(rich_help_panel=SCHEDULING, help="Token budget of one scheduler step. (default: 256)")
]
MaxRunning = Annotated[
    int | None, typer.Option(rich_help_panel=SCHEDULING, help="Requests that run at the same time. (default: 64)")
]
Eviction = Annotated[
    str | None,
    typer.Option(metavar="NAME", rich_help_panel=CACHE, help="lru, lfu, fifo, s3fifo or greedy-dual. (default: lru)"),
]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY",
        rich_help_panel=ACCESS,
        help="Accept this key; repeat for more. Other users see it in the process list.",
    ),
]
ApiKeyFile = Annotated[
    str | None, typer.Option(metavar="FILE", rich_help_panel=ACCESS, help="Accept the keys in this file, one a line.")
]
Tenants = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=ACCESS,
        help="YAML file of tenants: their keys, floors and quotas, and public prefixes.",
    ),
]
MaxBody = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        rich_help_panel=SERVER,
        help="Largest request body. (default: 16MiB, or 64 bytes a token of context)",
    ),
]
RequestTimeout = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        rich_help_panel=SERVER,
        help="End an answer with an error when its request is this old. (default: no limit)",
    ),
]
DrainSeconds = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        rich_help_panel=SERVER,
        help="Seconds for running answers to finish at shutdown. (default: 10)",
    ),
]
Warmup = Annotated[
    bool | None,
    typer.Option(
        "--warmup/--no-warmup",
        rich_help_panel=WARMUP,
        help="Compute system prompts before the server is ready. (default: on)",
    ),
]
WarmupTimeout = Annotated[
    str | None,
    typer.Option(
        metavar="SECONDS",
        rich_help_panel=WARMUP,
        help="Seconds that readiness waits for the warmup, 1 to 300. (default: 60)",
    ),
]
WarmupSystemFile = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=WARMUP,
        help="System prompt to warm instead of the built-in one; repeat for more.",
    ),
]
WarmupRequest = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=WARMUP,
        help="JSON body of a request to warm, with its tools and messages, as an agent sends it: a chat completion, an "
        "Anthropic message or a response; repeat for more.",
    ),
]
WarmupRequired = Annotated[
    bool | None,
    typer.Option(
        "--warmup-required", rich_help_panel=WARMUP, help="Report ready only when the system prompts are warm."
    ),
]
AdminKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        rich_help_panel=ACCESS,
        help="Key of the routes under /v1/cache; without any key, only this machine may use them.",
    ),
]
AdminKeyFile = Annotated[
    str | None, typer.Option(metavar="FILE", rich_help_panel=ACCESS, help="File that holds the admin key.")
]
MetricsKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        rich_help_panel=ACCESS,
        help="Key of /metrics; without one, the admin key's if API keys are set, or else open.",
    ),
]
MetricsKeyFile = Annotated[
    str | None, typer.Option(metavar="FILE", rich_help_panel=ACCESS, help="File that holds the metrics key.")
]
Canonical = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", rich_help_panel=CACHE, help="YAML file of rules that drop or move volatile lines of prompts."
    ),
]
AgentRules = Annotated[
    bool | None,
    typer.Option(
        "--agent-rules/--no-agent-rules",
        rich_help_panel=CACHE,
        help="Drop lines of known coding agents that change all the time and mean nothing to the model, such as Claude "
        "Code's billing line. (default: on)",
    ),
]
AnswerMemory = Annotated[
    bool | None,
    typer.Option(
        "--answer-memory/--no-answer-memory",
        rich_help_panel=CACHE,
        help="Remember answers, and put them into later prompts as they were sampled where clients send them back in "
        "other words, so that the cache has them. (default: on)",
    ),
]
NextTurnTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        rich_help_panel=CACHE,
        help="Where the chat template rewrites earlier turns: how many tokens a minute are computed, while idle, of "
        "what the next prompts of conversations begin with; 0: none. (default: 60000)",
    ),
]
RecordTrace = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=LOGS,
        help="Write a trace of the requests to this file: times, no text. An earlier one becomes FILE.1.",
    ),
]
OtlpEndpoint = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        rich_help_panel=LOGS,
        help="Send OpenTelemetry spans of each request to this collector, such as http://127.0.0.1:4318.",
    ),
]
TraceUnit = Annotated[
    int | None,
    typer.Option(rich_help_panel=LOGS, help="Tokens for each block id in the trace. (default: as many as a block has)"),
]
MaxConnections = Annotated[
    int | None, typer.Option(rich_help_panel=SERVER, help="Connections at once. (default: 1024)")
]
MaxRequests = Annotated[
    int | None,
    typer.Option(rich_help_panel=SERVER, help="Answers that are made or wait at once; more get 429. (default: 512)"),
]
OnOverflow = Annotated[
    str | None,
    typer.Option(
        metavar="clip|refuse",
        rich_help_panel=SERVER,
        help="A max_tokens that exceeds the rest of the context is clipped to it, or refused. (default: clip)",
    ),
]
CorsOrigin = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ORIGIN", rich_help_panel=SERVER,
        help="Web pages from this origin, such as https://example.com, may use the API; repeat for more.",
    ),
]  # fmt: skip
RootPath = Annotated[
    str | None,
    typer.Option(rich_help_panel=SERVER, help="Path under which a proxy serves the API, such as /emberkv."),
]
TlsCert = Annotated[
    str | None,
    typer.Option(metavar="FILE", rich_help_panel=SERVER, help="PEM file of the certificate to serve HTTPS with."),
]
TlsKey = Annotated[
    str | None,
    typer.Option(metavar="FILE", rich_help_panel=SERVER, help="PEM file of the certificate's private key."),
]
ClusterSecretFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=CLUSTER,
        help="File with the secret that gateways and workers share. With it, a server is a worker.",
    ),
]
WorkerUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL", rich_help_panel=CLUSTER, help="Where gateways reach the worker. (default: where it listens)"
    ),
]
Gateway = Annotated[
    list[str] | None,
    typer.Option(metavar="URL", rich_help_panel=CLUSTER, help="Register at this gateway; repeat for more."),
]
LogLevel = Annotated[
    str | None,
    typer.Option(metavar="NAME", rich_help_panel=LOGS, help="debug, info, warning or error. (default: info)"),
]
LogFormat = Annotated[
    str | None, typer.Option(metavar="NAME", rich_help_panel=LOGS, help="text or json. (default: text)")
]
WorkerId = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=CLUSTER,
        help="Its name. (default: the host and port it is reached at)",
    ),
]
KVRoutes = Annotated[
    bool | None,
    typer.Option(
        "--kv-routes",
        rich_help_panel=CLUSTER,
        help="Add /kv for KV tensors of other engines by sequence and layer, /generate, /inference and /stats.",
    ),
]
KVMaxBytes = Annotated[
    str | None,
    typer.Option(metavar="SIZE", rich_help_panel=CLUSTER, help="Limit of the tensors under /kv. (default: 1GiB)"),
]
KVMaxEntries = Annotated[
    int | None,
    typer.Option(rich_help_panel=CLUSTER, help="Layers of all sequences under /kv together. (default: 50000)"),
]
ModelOnDemand = Annotated[
    bool | None,
    typer.Option(
        "--model-on-demand",
        rich_help_panel=MODEL,
        help="Load the model when a request first needs it; DELETE /inference/model unloads it (--kv-routes).",
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", envvar="EMBERKV_CONFIG", show_envvar=False, rich_help_panel=CONFIGURATION,
        help="YAML or TOML file of settings, named as the options.",
    ),
]  # fmt: skip
PrintConfig = Annotated[
    bool,
    typer.Option(
        "--print-config", rich_help_panel=CONFIGURATION,
        help="Print all settings and where each comes from, without keys, and exit.",
    ),
]  # fmt: skip
