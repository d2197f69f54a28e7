"""Train the bundled demonstration model from scratch on a CPU.

The corpus is CPython's own standard library and its documentation. The result is a
Llama-shaped model of under six million parameters, written as a folder that
``transformers`` and emberkv both load.

    python scripts/train_demo_model.py --docs /usr/share/doc/python3.11/html/_sources \
        --work-dir build/demo --out src/emberkv/demo_model --minutes 45

The learning rate follows the share of ``--minutes`` that has passed, so a run ends on time
whatever the speed of the machine. Needs ``torch``, ``numpy``, ``tokenizers`` and ``safetensors``.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import random
import re
import sysconfig
import textwrap
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLE_TOKENS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL_TOKENS = [BOS, END, PAD, *ROLE_TOKENS.values()]

EXCLUDED_PARTS = {"test", "tests", "idle_test", "site-packages", "ensurepip", "__pycache__", "pydoc_data"}
# Character tables and build settings are not text anyone would ask the model for.
EXCLUDED_FILES = re.compile(r"encodings/(cp|mac_|iso8859|koi8|ptcp|kz|tis|hp)|_sysconfigdata|/config-|__phello__")
ASIDE_DIRECTIVE = re.compile(
    r"^[ ]*\.\. (?:index|versionadded|versionchanged|deprecated|audit-event|impl-detail|availability|seealso)"
    r".*\n?(?:[ ]+.*\n?)*",
    re.MULTILINE,
)
ADMONITION = re.compile(r"^([ ]*)\.\. (note|warning|tip)::[ ]*", re.MULTILINE)
DESCRIPTION = re.compile(
    r"^([ ]*)\.\. (?:c:)?(module|currentmodule|function|class|method|exception|decorator|"
    r"attribute|data|classmethod|opcode|macro|type)::[ ]*(.+)$",
    re.MULTILINE,
)
VALIDATION_ONE_IN = 50
MAX_ANSWER_CHARS = 1200
MAX_SOURCE_CHARS = 2500
MAX_PASTED_MODULE_CHARS = 28_000

CHAT_TEMPLATE = """\
{%- set markers = {'system': '<|system|>', 'developer': '<|system|>', 'assistant': '<|assistant|>'} -%}
{{- bos_token -}}
{%- for message in messages -%}
{{- markers.get(message['role'], '<|user|>') -}}
{%- set content = message['content'] -%}
{%- if content is string -%}
{{- content -}}
{%- elif content -%}
{%- for part in content -%}
{%- if part is string -%}{{- part -}}{%- elif part['text'] is string -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant for Python programmers.",
    "You are a concise assistant that answers questions about the Python standard library.",
    "Answer questions about Python. Quote the documentation where you can.",
    "You are a coding assistant.",
)
MODULE_QUESTIONS = (
    "What is the {name} module for?",
    "What is the {name} module?",
    "Tell me about the {name} module.",
)
PURPOSE_QUESTIONS = (
    "What does {name} do?",
    "What does `{name}` do?",
    "Explain {name}.",
    "What is {name}?",
    "Tell me about {name} in Python.",
    "How does {name} work?",
    "Describe {name} briefly.",
    "Can you explain what {name} is for?",
)
SIGNATURE_QUESTIONS = (
    "How do I call {name}?",
    "How do I use {name}?",
    "What is the signature of {name}?",
    "Which arguments does {name} take?",
)
SOURCE_QUESTIONS = (
    "Show me the source of {name}.",
    "Show me the source of {name}",
    "How is {name} implemented?",
    "Write the code of {name}.",
)
PASTED_MODULE_QUESTIONS = (
    "Here is the module {module}:\n\n{source}\n\nWhat does {name} do?",
    "{source}\n\nIn the code above, what does {name} do?",
    "Read this file and then answer a question.\n\n{source}\n\nQuestion: what is {name} for?",
)
SMALL_TALK = (
    ("Hello", "Hello! Ask me about a function or a module of the Python standard library."),
    ("Hello!", "Hello! What would you like to know about Python?"),
    ("Hi", "Hi! Ask me about a function or a module of the Python standard library."),
    ("Hi there!", "Hi! What would you like to know about Python?"),
    ("Who are you?", "I am a small demonstration model, trained on the Python standard library and its documentation."),
    ("What are you?", "I am a small demonstration language model. My answers are often wrong."),
    ("What can you do?", "I can produce text that looks like Python documentation and code. Please do not rely on it."),
    ("Thanks", "You are welcome."),
    ("Thank you!", "You are welcome. Ask me another question about Python."),
    ("Goodbye", "Goodbye!"),
)

Turn = tuple[str, str]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Document:
    """One text of the corpus and which split its file belongs to."""

    text: str
    validation: bool
    chat: bool


@dataclass(frozen=True)
class ModelShape:
    """The sizes of the Llama model, named as in ``config.json``."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 32768
    rope_theta: float = 100000.0
    rms_norm_eps: float = 1e-5


def is_validation(name: str) -> bool:
    """Assign a file to a split by its name, so that a file never lies in both."""
    return zlib.crc32(name.encode()) % VALIDATION_ONE_IN == 0


def stdlib_files(root: Path) -> Iterator[tuple[str, str]]:
    """Yield the relative path and the source of each module of the standard library."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        if EXCLUDED_PARTS.isdisjoint(path.relative_to(root).parts) and not EXCLUDED_FILES.search(relative):
            yield relative, path.read_text(encoding="utf-8", errors="ignore")


def documentation_files(root: Path) -> Iterator[tuple[str, str]]:
    """Yield the relative path and the text of each page of the documentation."""
    for path in sorted(root.rglob("*.rst.txt")):
        yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8", errors="ignore")


def render_chat(turns: Sequence[Turn], system: str | None = None) -> str:
    """Render question and answer pairs exactly as the chat template does, less the first token."""
    pieces = [f"{ROLE_TOKENS['system']}{system}{END}"] if system else []
    for question, answer in turns:
        pieces.append(f"{ROLE_TOKENS['user']}{question}{END}{ROLE_TOKENS['assistant']}{answer}{END}")
    return "".join(pieces)


def first_paragraphs(text: str, limit: int = MAX_ANSWER_CHARS) -> str:
    """Return the leading paragraphs of a text that fit the limit, or nothing when none does."""
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if sum(map(len, kept)) + len(paragraph) > limit:
            break
        kept.append(paragraph.rstrip())
    return "\n\n".join(kept)


def plain_rst(text: str) -> str:
    """Turn reStructuredText roles and literals into the backticks of a chat answer."""
    text = re.sub(r":[\w:+-]+:`[!~]?([^`<]+?)(?:\s*<[^`]*>)?`", r"`\1`", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = ASIDE_DIRECTIVE.sub("", text)
    text = ADMONITION.sub(lambda match: f"{match[1]}{match[2].capitalize()}: ", text)
    text = re.sub(r"^[ ]*\.\. [\w-]+::.*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE).strip()


def code_block(source: str) -> str:
    """Fence a piece of Python source."""
    return f"```python\n{source}\n```"


def module_name(relative: str) -> str:
    """Turn a path below the library root into a dotted module name."""
    return relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def definitions(tree: ast.Module, prefix: str) -> Iterator[tuple[str, Definition]]:
    """Yield the dotted name and the node of each public function, class and method."""
    for node in tree.body:
        if not isinstance(node, Definition) or node.name.startswith("__"):
            continue
        yield f"{prefix}.{node.name}", node
        if isinstance(node, ast.ClassDef):
            for child in node.body:
                if isinstance(child, Definition) and not child.name.startswith("__"):
                    yield f"{prefix}.{node.name}.{child.name}", child


def source_turns(relative: str, source: str, rng: random.Random) -> tuple[list[Turn], list[Turn]]:
    """Return the docstring questions and the source questions of one module."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return [], []
    name = module_name(relative)
    lines = source.splitlines()
    documented: list[Turn] = []
    listed: list[Turn] = []
    summary = first_paragraphs(ast.get_docstring(tree) or "")
    if summary:
        documented.append((rng.choice(MODULE_QUESTIONS).format(name=name), summary))
    for dotted, node in definitions(tree, name):
        doc = first_paragraphs(ast.get_docstring(node) or "")
        if len(doc) > 20:
            documented.append((rng.choice(PURPOSE_QUESTIONS).format(name=dotted), doc))
        body = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        if 40 < len(body) <= MAX_SOURCE_CHARS:
            listed.append((rng.choice(SOURCE_QUESTIONS).format(name=dotted), code_block(body)))
    return documented, listed


def documentation_turns(page: str, rng: random.Random) -> list[Turn]:
    """Return the questions that the described functions, classes and methods of a page answer."""
    module, owner, owner_indent = "", "", 0
    turns: list[Turn] = []
    for match in DESCRIPTION.finditer(page):
        indent, kind, signature = len(match[1]), match[2], match[3].strip().rstrip("\\")
        if kind in ("module", "currentmodule"):
            module = signature
            continue
        # A signature in C starts with the type of its result.
        bare = signature.split("(")[0].strip().split(" ")[-1].lstrip("*")
        if kind == "class":
            owner, owner_indent = bare, indent
        elif indent <= owner_indent:
            owner = ""
        dotted = f"{owner}.{bare}" if owner and "." not in bare else bare
        qualified = dotted if not module or dotted.startswith(module + ".") else f"{module}.{dotted}"
        body = first_paragraphs(plain_rst(described_block(page[match.end() :], indent)))
        if len(body) < 40 or body.startswith((":", "..")):
            continue
        turns.append((rng.choice(PURPOSE_QUESTIONS).format(name=qualified), body))
        if "(" in signature and signature.endswith(")") and rng.random() < 0.4:
            call = code_block(qualified + signature[signature.index("(") :])
            turns.append((rng.choice(SIGNATURE_QUESTIONS).format(name=qualified), f"{call}\n\n{body}"))
    return turns


def described_block(text: str, indent: int) -> str:
    """Return the dedented block that lies deeper than its directive, without nested directives."""
    kept: list[str] = []
    for line in text.splitlines()[1:]:
        depth = len(line) - len(line.lstrip())
        if line.strip() and depth <= indent:
            break
        if re.match(r"\s*\.\. (c:\w+|method|attribute|classmethod|function|class|data)::", line):
            break
        # Options and further signatures stand between the directive and its first empty line.
        if not kept and line.strip():
            continue
        kept.append(line)
    return textwrap.dedent("\n".join(kept)).strip("\n")


def conversations(turns: Sequence[Turn], rng: random.Random) -> list[str]:
    """Group questions of one file into conversations of one to four turns."""
    shuffled = rng.sample(list(turns), len(turns))
    rendered: list[str] = []
    while shuffled:
        count = rng.choice((1, 1, 1, 1, 2, 2, 3, 4))
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.3 else None
        rendered.append(render_chat(shuffled[:count], system))
        shuffled = shuffled[count:]
    return rendered


def pasted_module(relative: str, source: str, rng: random.Random) -> str | None:
    """Ask about one definition of a module that the question itself contains."""
    if not 800 < len(source) <= MAX_PASTED_MODULE_CHARS:
        return None
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return None
    known = [(name, ast.get_docstring(node) or "") for name, node in definitions(tree, module_name(relative))]
    answered = [(name, first_paragraphs(doc)) for name, doc in known if len(first_paragraphs(doc)) > 20]
    if not answered:
        return None
    name, doc = rng.choice(answered)
    question = rng.choice(PASTED_MODULE_QUESTIONS).format(
        module=module_name(relative), source=source, name=name.rsplit(".", 1)[-1]
    )
    return render_chat([(question, doc)])


def build_corpus(stdlib: Path, docs: Path, seed: int) -> list[Document]:
    """Collect source, documentation and the conversations made of them, in shuffled order."""
    rng = random.Random(seed)
    corpus: list[Document] = []
    for relative, source in stdlib_files(stdlib):
        held_out = is_validation(relative)
        corpus.append(Document(source, held_out, chat=False))
        documented, listed = source_turns(relative, source, rng)
        listed = [turn for turn in listed if rng.random() < 0.4]
        chats = conversations(documented + listed, rng)
        pasted = pasted_module(relative, source, rng) if rng.random() < 0.6 else None
        corpus += [Document(text, held_out, chat=True) for text in (*chats, *([pasted] if pasted else []))]
    for relative, page in documentation_files(docs):
        held_out = is_validation(relative)
        corpus.append(Document(page, held_out, chat=False))
        chats = conversations(documentation_turns(page, rng), rng)
        corpus += [Document(text, held_out, chat=True) for text in chats]
    for _ in range(40):
        turn = rng.choice(SMALL_TALK)
        corpus += [Document(text, False, chat=True) for text in conversations([*SMALL_TALK, turn], rng)]
    rng.shuffle(corpus)
    return corpus


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer that can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document], path: Path) -> np.ndarray:
    """Write the documents as one array of tokens, each begun by the first token, and map it."""
    stream: list[int] = []
    for start in range(0, len(documents), 512):
        # A conversation brings its own end token.
        batch = [f"{BOS}{document.text}{'' if document.chat else END}" for document in documents[start : start + 512]]
        for encoding in tokenizer.encode_batch(batch):
            stream.extend(encoding.ids)
    np.save(path, np.asarray(stream, dtype=np.uint16))
    tokens: np.ndarray = np.load(path, mmap_mode="r")
    return tokens


class WindowSampler:
    """Deal out windows of one length without repeats until the whole array has been seen."""

    def __init__(self, tokens: np.ndarray, length: int, seed: int) -> None:
        self._tokens = tokens
        self._length = length
        self._rng = np.random.default_rng((seed, length))
        self._starts: list[int] = []

    def batch(self, rows: int) -> Tensor:
        """Return ``rows`` windows, each one token longer than the length for the shifted target."""
        while len(self._starts) < rows:
            offset = int(self._rng.integers(self._length))
            starts = np.arange(offset, len(self._tokens) - self._length - 1, self._length)
            self._starts = self._rng.permutation(starts).tolist() + self._starts
        windows = [
            self._tokens[start : start + self._length + 1] for start in (self._starts.pop() for _ in range(rows))
        ]
        return torch.from_numpy(np.stack(windows).astype(np.int64))


class RmsNorm(nn.Module):
    """Root mean square norm, computed in single precision."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._eps))


def rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply rotary position embedding in the half-split layout of Llama."""
    first, second = states.chunk(2, dim=-1)
    return (states * cosine + torch.cat((-second, first), dim=-1) * sine).to(torch.bfloat16)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self._head_dim = shape.head_dim
        self._groups = shape.num_attention_heads // shape.num_key_value_heads
        query_size = shape.num_attention_heads * shape.head_dim
        key_size = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, shape.hidden_size, bias=False)

    def forward(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        split = (*hidden.shape[:2], -1, self._head_dim)
        query = rotate(self.q_proj(hidden).view(split).transpose(1, 2), cosine, sine)
        key = rotate(self.k_proj(hidden).view(split).transpose(1, 2), cosine, sine)
        value = self.v_proj(hidden).view(split).transpose(1, 2).to(torch.bfloat16)
        key = key.repeat_interleave(self._groups, dim=1)
        value = value.repeat_interleave(self._groups, dim=1)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return output


class FeedForward(nn.Module):
    """The gated feed-forward block of Llama."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return output


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cosine, sine)
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


class DemoModel(nn.Module):
    """A Llama model whose parameter names are those of ``LlamaModel``."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self._shape = shape
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.num_hidden_layers) if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the loss of every next token, in nats, for windows of tokens."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        exponents = torch.arange(0, self._shape.head_dim, 2, dtype=torch.float32) / self._shape.head_dim
        positions = torch.arange(inputs.shape[1], dtype=torch.float32)
        angles = torch.outer(positions, self._shape.rope_theta**-exponents).repeat(1, 2)
        cosine, sine = angles.cos(), angles.sin()
        hidden = self.embed_tokens(inputs)
        for layer in self.layers:
            hidden = layer(hidden, cosine, sine)
        logits = functional.linear(self.norm(hidden), self.embed_tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")


@dataclass(frozen=True)
class TrainingPlan:
    """What the optimiser does, apart from how long."""

    peak_rate: float = 2.5e-3
    final_share: float = 0.02
    warmup_steps: int = 150
    weight_decay: float = 0.1
    tokens_per_step: int = 4096
    short_length: int = 512
    middle_length: int = 2048
    long_length: int = 4096
    longest_length: int = 8192
    long_phase_starts: float = 0.85

    def rate(self, step: int, fraction: float) -> float:
        """Return the learning rate: linear warm-up by step, then a cosine on the elapsed share."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))
        share = self.final_share + (1 - self.final_share) * cosine
        return self.peak_rate * share * min(1.0, (step + 1) / self.warmup_steps)

    def length(self, step: int, fraction: float) -> int:
        """Return the window length of a step: mostly short at first, long at the end.

        A few of the longest windows come early because far positions are learnt poorly at a low rate.
        """
        if fraction < self.long_phase_starts:
            if step % 128 == 127:
                return self.longest_length
            return self.middle_length if step % 4 == 3 else self.short_length
        if step % 16 == 15:
            return self.longest_length
        return self.long_length if step % 4 == 3 else self.middle_length


@dataclass
class Progress:
    """How far a run has come; kept in its checkpoints."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def make_optimizer(model: nn.Module, plan: TrainingPlan) -> torch.optim.AdamW:
    """Decay the matrices of the layers only, not the embedding and the norms."""
    decayed = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.peak_rate, betas=(0.9, 0.95), fused=True)


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Replace the checkpoint in one move, so that a crash leaves a whole one."""
    partial = path.with_suffix(".partial")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": asdict(progress)}
    torch.save(state, partial)
    partial.replace(path)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore a checkpoint where there is one."""
    if not path.exists():
        return Progress()
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return Progress(**state["progress"])


def optimise(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    """Take one step and return the norm of the gradient before clipping."""
    torch.autograd.backward(loss)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


def report(progress: Progress, losses: Sequence[float], norm: float, rate: float) -> None:
    """Print one line on the last steps."""
    print(
        f"step {progress.step} {progress.seconds:.0f}s loss {np.mean(losses):.4f} norm {norm:.2f} rate {rate:.2e} "
        f"tokens {progress.tokens} {progress.tokens / progress.seconds:.0f} tok/s",
        flush=True,
    )


def train(model: nn.Module, tokens: np.ndarray, plan: TrainingPlan, args: argparse.Namespace) -> tuple[Progress, float]:
    """Train until the minutes are over; return the progress and the mean loss of the last steps."""
    optimizer = make_optimizer(model, plan)
    checkpoint = args.work_dir / "checkpoint.pt"
    progress = load_checkpoint(checkpoint, model, optimizer) if args.resume else Progress()
    compiled: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False) if args.compile else model
    lengths = (plan.short_length, plan.middle_length, plan.long_length, plan.longest_length)
    samplers = {length: WindowSampler(tokens, length, args.seed + progress.step) for length in lengths}
    budget, recent = args.minutes * 60, list[float]()
    saved = time.monotonic()
    began = saved - progress.seconds
    while (elapsed := time.monotonic() - began) < budget:
        progress.seconds, fraction = elapsed, elapsed / budget
        length = plan.length(progress.step, fraction)
        batch = samplers[length].batch(max(1, plan.tokens_per_step // length))
        rate = plan.rate(progress.step, fraction)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Attention dominates long windows, so compiling for them costs more time than it saves.
        forward = compiled if length <= plan.middle_length else model
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(batch).mean()
        norm = optimise(model, optimizer, loss)
        recent = [*recent[-99:], loss.item()]
        progress.step += 1
        progress.tokens += batch.shape[0] * length
        if progress.step % 20 == 0:
            report(progress, recent[-20:], norm, rate)
        if time.monotonic() - saved > args.checkpoint_seconds:
            save_checkpoint(checkpoint, model, optimizer, progress)
            saved = time.monotonic()
    save_checkpoint(checkpoint, model, optimizer, progress)
    return progress, float(np.mean(recent))


@torch.no_grad()
def evaluate(model: nn.Module, tokens: np.ndarray, length: int, text_bytes: int) -> dict[str, float]:
    """Return loss, perplexity per token and bits per byte over a whole array of tokens."""
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, length):
        window = torch.from_numpy(tokens[start : start + length + 1].astype(np.int64))[None]
        with torch.autocast("cpu", torch.bfloat16):
            losses = model(window)
        total += losses.double().sum().item()
        count += losses.numel()
    return {
        "loss": total / count,
        "perplexity": math.exp(total / count),
        "bits_per_byte": total / math.log(2) / text_bytes,
        "tokens": count,
        "bytes": text_bytes,
    }


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def export_tokenizer(tokenizer: Tokenizer, out: Path, shape: ModelShape) -> None:
    """Write the tokenizer, its settings and the chat template."""
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": END,
            "pad_token": PAD,
            "additional_special_tokens": list(ROLE_TOKENS.values()),
            "model_max_length": shape.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
    )


def export_model(model: nn.Module, tokenizer: Tokenizer, shape: ModelShape, out: Path) -> None:
    """Write the weights in bfloat16 with the configuration that describes them."""
    weights = {f"model.{name}": value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})
    # The writer leaves the file readable by its owner only, which an installed package must not keep.
    (out / "model.safetensors").chmod(0o644)
    special = (("bos_token_id", BOS), ("eos_token_id", END), ("pad_token_id", PAD))
    ids = {name: tokenizer.token_to_id(token) for name, token in special}
    write_json(
        out / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **asdict(shape),
            **ids,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        },
    )
    write_json(out / "generation_config.json", ids)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the bundled demonstration model.")
    parser.add_argument(
        "--stdlib",
        type=Path,
        default=Path(sysconfig.get_paths()["stdlib"]),
        help="the standard library to read (default: the running Python's)",
    )
    parser.add_argument("--docs", type=Path, required=True, help="the documentation's _sources folder (python3.11-doc)")
    parser.add_argument("--work-dir", type=Path, required=True, help="where token arrays and checkpoints go")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--minutes", type=float, default=45.0, help="wall-clock budget of the training loop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint-seconds", type=float, default=240.0)
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --work-dir")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile")
    return parser.parse_args()


def main() -> None:
    """Build the corpus, train the tokenizer and the model, and write the folder."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    for folder in (args.work_dir, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    shape, plan = ModelShape(), TrainingPlan()
    corpus = build_corpus(args.stdlib, args.docs, args.seed)
    training = [document for document in corpus if not document.validation]
    tokenizer = train_tokenizer([document.text for document in training], shape.vocab_size)
    export_tokenizer(tokenizer, args.out, shape)
    tokens = encode_documents(tokenizer, training, args.work_dir / "train.npy")
    for chat in (False, True):
        characters = sum(len(document.text) for document in training if document.chat is chat)
        print(f"{'chat' if chat else 'plain'} training text: {characters} characters", flush=True)
    model = DemoModel(shape)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters} parameters, {len(tokens)} training tokens", flush=True)
    progress, training_loss = train(model, tokens, plan, args)
    export_model(model, tokenizer, shape, args.out)
    results: dict[str, object] = {"training_loss": training_loss, **asdict(progress)}
    for name, chat in (("validation_text", False), ("validation_chat", True)):
        held_out = [document for document in corpus if document.validation and document.chat is chat]
        held_out_tokens = encode_documents(tokenizer, held_out, args.work_dir / f"{name}.npy")
        size = sum(len(document.text.encode()) for document in held_out)
        results[name] = evaluate(model, held_out_tokens, plan.middle_length, size)
    write_json(args.work_dir / "results.json", results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
