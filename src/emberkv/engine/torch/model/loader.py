"""Loads a model from a folder or the hub into the memory that is free, or says precisely why it cannot be served."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import transformers
from huggingface_hub.utils.tqdm import disable_progress_bars
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from emberkv.engine.request import SamplingParams
from emberkv.engine.tokenization.hf_tokenizer import HFTokenizer
from emberkv.engine.tokenization.template_check import install_chat_template
from emberkv.engine.torch.model.attention_interface import calls_interface, own_implementation
from emberkv.engine.torch.model.checkpoint import Fetch, fetch_from_hub, find_model
from emberkv.engine.torch.model.generation_config import GenerationConfigMode, end_tokens, sampling_defaults
from emberkv.engine.torch.model.geometry import ModelGeometry
from emberkv.engine.torch.model.inspection import inspect_model
from emberkv.engine.torch.model.source import FolderSource, ModelSource, read_tokenizer
from emberkv.engine.torch.quantization.layers import quantized_weights
from emberkv.engine.torch.quantization.on_load import QuantizeName
from emberkv.engine.torch.quantization.weight import DTYPES, Fit
from emberkv.errors import ConfigError, CorruptModelError, ModelError

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes free for allocation where ``device`` computes; of a CPU, at most what a container's limit leaves."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    within = cgroup_free(_CGROUPS, _OWN_CGROUP)
    available = int(psutil.virtual_memory().available)
    return available if within is None else min(available, within)


def cgroup_free(mounted: Path, own: Path) -> int | None:
    """What this process' control group (version 2) and those above it leave; None where none has a limit.

    mounted: where groups are. own: the file that names this process'. What is only cached from files counts as free.
    """
    lines = own.read_text().splitlines() if own.is_file() else []
    inner = next((line[3:].strip("/") for line in lines if line.startswith("0::")), None)
    if inner is None:
        return None
    group = mounted / inner
    left = [_left_in(each) for each in (group, *group.parents) if each.is_relative_to(mounted)]
    return min((each for each in left if each is not None), default=None)


def _left_in(group: Path) -> int | None:
    limit, current, stat = group / "memory.max", group / "memory.current", group / "memory.stat"
    if not (limit.is_file() and current.is_file() and stat.is_file()) or limit.read_text().strip() == "max":
        return None
    fields = dict(line.split() for line in stat.read_text().splitlines())
    return max(0, int(limit.read_text()) - int(current.read_text()) + int(fields.get("inactive_file", 0)))


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


_log = logging.getLogger(__name__)

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
KVDTypeName = Literal["auto", "int8"]
Progress = Callable[[str], None]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class ModelDtypes:
    """Which type each kind of value has. They are equal unless weights, or keys and values, are quantised.

    weights: as they are computed with, which may differ from how the files store them; int8 or int4 where the linear
    layers' are quantised, the other weights then being of the activations' type. activations: of what the layers
    pass on, and of the logits. kv: of the keys and values in the pool and in the tiers.
    """

    weights: torch.dtype
    activations: torch.dtype
    kv: torch.dtype

    @classmethod
    def all_of(cls, dtype: torch.dtype) -> "ModelDtypes":
        return cls(dtype, dtype, dtype)

    def __str__(self) -> str:
        """The one name where they are equal: "bfloat16"; else "int8 weights, bfloat16 activations, float16 KV"."""
        weights, activations, kv = map(dtype_name, (self.weights, self.activations, self.kv))
        same = weights == activations == kv
        return weights if same else f"{weights} weights, {activations} activations, {kv} KV"


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to compute, in eval mode on its device.

    name: the hub id, or the folder's own name.
    context_length: most tokens of a prompt and its answer together.
    eos_token_ids: any of these ends an answer.
    fingerprint: hex identity of the weights and config, by content.
    sampling_defaults: for what requests do not set.
    """

    model: PreTrainedModel
    tokenizer: HFTokenizer
    name: str
    folder: Path
    dtypes: ModelDtypes
    device: torch.device
    eos_token_ids: frozenset[int]
    fingerprint: str
    geometry: ModelGeometry
    sampling_defaults: SamplingParams = field(default_factory=SamplingParams)

    @property
    def context_length(self) -> int:
        return self.geometry.context_length


def load_model(
    name_or_path: str,
    *,
    dtype: DTypeName = "auto",
    device: str = "auto",
    quantize: QuantizeName = "none",
    kv_dtype: KVDTypeName = "auto",
    fit: Fit | None = None,
    attn_implementation: str = "eager",
    chat_template: str | None = None,
    generation_config: GenerationConfigMode = "auto",
    progress: Progress = lambda _: None,
    fetch: Fetch = fetch_from_hub,
) -> LoadedModel:
    """Load a causal language model whose state is per-token KV.

    dtype: "auto" keeps the checkpoint's, except that float16 becomes float32 on a CPU, which has no fast float16.
    quantize: "int8" or "int4" rounds the linear layers' weights while they are loaded, the output layer's to 8 bits.
    fit: what finds the scales of 4 bits, in place of torch (see `quantise`).
    kv_dtype: of keys and values in the pool: "auto" keeps the activations'; "int8" rounds each head of each token.
    device: "auto" takes cuda, then mps, then cpu; otherwise a torch device such as "cuda:1".
    attn_implementation: a name registered with transformers' AttentionInterface. Models that do not call it are loaded
    with their own, and the engine changes that.
    chat_template: the name of one of the model's templates, or a file that holds one; None: the model's own. A template
    that cannot be used is warned of, and leaves `HFTokenizer.chat_problem`.
    generation_config: "auto" takes sampling defaults from the model's generation_config.json; "ignore" does not, and
    accepts a file that is broken. The end tokens that it names count in both cases.
    progress: called with a short line at the start of each stage.

    Raises ModelNotFoundError, CorruptModelError (also for files that change meanwhile), UnsupportedModelError
    (before any weights are read), ModelError for weights that do not fit into memory, and ConfigError for a dtype or
    device that cannot be used.
    """
    _silence()
    target = choose_device(device)
    progress(f"finding {name_or_path}")
    path = find_model(name_or_path, fetch)
    source = open_source(path, quantize, fit)
    if (path / "adapter_config.json").is_file():
        _log.warning("%s holds an adapter (adapter_config.json), which is not applied: merge it into the weights", path)
    shape = inspect_model(source.config)
    generation = source.generation(generation_config)
    source.check(shape)
    chosen = choose_dtype(dtype, source.stored_dtype(), target)
    if quantize != "none" and target.type != "cpu":
        raise ConfigError(f"--quantize is {quantize} and the device is {target}; it is for the CPU")
    check_memory(path, source.num_bytes(shape, chosen), chosen, target)
    progress("loading the tokenizer")
    tokenizer = source.tokenizer()
    chat_problem = install_chat_template(tokenizer, path, chat_template)
    model, fingerprint = _load_weights(source, path, chosen, attn_implementation, progress)
    torch.nn.Module.to(model, target).requires_grad_(False)
    return LoadedModel(
        model=model,
        tokenizer=HFTokenizer(tokenizer, chat_problem=chat_problem),
        name=path.resolve().name.removesuffix(".gguf") if Path(name_or_path).expanduser() == path else name_or_path,
        folder=path,
        dtypes=ModelDtypes(_weights_dtype(model, chosen), chosen, torch.int8 if kv_dtype == "int8" else chosen),
        device=target,
        eos_token_ids=_eos_token_ids(source, generation, tokenizer),
        fingerprint=fingerprint,
        geometry=shape.geometry,
        sampling_defaults=sampling_defaults(generation) if generation_config == "auto" else SamplingParams(),
    )


def _load_weights(
    source: ModelSource, path: Path, dtype: torch.dtype, attn_implementation: str, progress: Progress
) -> tuple[PreTrainedModel, str]:
    """The model, and the fingerprint of its weights. Raises CorruptModelError for files that change meanwhile."""
    progress("identifying the weights")
    before = source.file_states()
    fingerprint = source.fingerprint()
    progress(f"loading {sum(size for _, _, size, _, _ in before) / 2**20:,.0f} MiB of weights")
    if not calls_interface(source.config):
        attn_implementation = own_implementation(source.config)
    model = source.load(dtype, attn_implementation)
    if source.file_states() != before:
        raise CorruptModelError(f"the files in {path} changed while they were loaded; start again")
    return model, fingerprint


def load_tokenizer(
    name_or_path: str, chat_template: str | None = None, *, fetch: Fetch = fetch_from_hub
) -> HFTokenizer:
    """A model's tokenizer without the model. chat_template: as for `load_model`.

    Raises ModelNotFoundError, CorruptModelError or UnsupportedModelError, and ConfigError for a template that is none.
    """
    _silence()
    path = find_model(name_or_path, fetch)
    tokenizer = read_tokenizer(path) if path.is_dir() else open_source(path).tokenizer()
    return HFTokenizer(tokenizer, chat_problem=install_chat_template(tokenizer, path, chat_template))


def open_source(path: Path, quantize: QuantizeName = "none", fit: Fit | None = None) -> ModelSource:
    """What a folder or a GGUF file, of `find_model`, holds. quantize, fit: see `load_model`.

    Raises CorruptModelError, UnsupportedModelError, and ConfigError where weights that are quantised already would be
    rounded again.
    """
    if path.is_dir():
        return FolderSource(path, quantize, fit)
    if quantize != "none":
        raise ConfigError(f"--quantize is {quantize}, which rounds plain weights; {path} is a GGUF file")
    from emberkv.engine.torch.model.gguf_file import GGUFSource  # noqa: PLC0415 - the gguf package, for few models

    return GGUFSource(path)


def _weights_dtype(model: PreTrainedModel, plain: torch.dtype) -> torch.dtype:
    """The type of most linear layers' weights, as those of the output layer often have more bits."""
    bits = [each.bits for each in quantized_weights(model)]
    return DTYPES[max(set(bits), key=bits.count)] if bits else plain


def choose_device(device: str) -> torch.device:
    """The torch device that ``device`` names. Raises ConfigError when it is unknown or not here."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device is {device!r}; accepted are auto, cpu, cuda, cuda:<number> and mps") from error
    present = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }.get(chosen.type, 0)
    if (chosen.index or 0) >= present:
        raise ConfigError(f"device is {device!r}, of which this machine has {present}; auto takes what is there")
    return chosen


def choose_dtype(dtype: DTypeName, checkpoint: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype to compute in, given the one that the checkpoint is stored in (None: unknown)."""
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; accepted are auto, {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    if checkpoint not in (torch.bfloat16, torch.float16) or (checkpoint is torch.float16 and device.type == "cpu"):
        return torch.float32
    return checkpoint


def _silence() -> None:
    """Progress is ours to show, and what transformers only warns of is an error here or of no interest."""
    quiet: Any = transformers.logging  # its functions are untyped
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    disable_progress_bars()


def check_memory(path: Path, needed: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ModelError where the weights, with ``dtype`` for those that are plain, exceed the free memory."""
    free = free_memory(device)
    if needed > free:
        raise ModelError(
            f"the weights in {path} take {gib(needed)} as {dtype_name(dtype)}; {gib(free)} are free on {device}"
        )


def _eos_token_ids(
    source: ModelSource, generation: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast
) -> frozenset[int]:
    """The ends that generation_config.json, the config and the tokenizer name, all of them.

    Where neither file names one, it is the architecture's own.
    """
    named = [generation.get("eos_token_id"), *source.named_ends()]
    if all(each is None for each in named):
        named = [getattr(source.config.get_text_config(decoder=True), "eos_token_id", None)]
    return end_tokens([*named, tokenizer.eos_token_id])
