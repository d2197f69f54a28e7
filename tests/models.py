"""Tiny random models with real tokenizers, written to disk as checkpoints: the tests' model zoo."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from tests.architectures import ALSO_SUPPORTED, CONTEXT, REFUSED, SUPPORTED, VOCAB_SIZE, model_type

_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
EOS, USER_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_TEXT = (
    "The library opens at nine and closes when the last reader has gone home.",
    "A river carries what the rain gives it; a lake keeps it for a while.",
    "She counted the lamps along the street: one, two, three, and then no more.",
    "def area(width, height):\n    return width * height\n",
    "Most of the work is waiting, and the rest of the work is knowing what to wait for.",
)


def byte_level_bpe() -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE tokens, trained here; ids 0 to 2 are its special tokens."""
    return Tokenizer.from_str(_trained())


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, USER_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    trained: str = tokenizer.to_str()
    return trained


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of every tiny model, with a chat template that rejects unknown roles."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(),
        bos_token=EOS,
        eos_token=TURN_END,
        extra_special_tokens=[USER_START],
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """Write `tiny_tokenizer` as transformers saves it."""
    for name, content in _tokenizer_files().items():
        (folder / name).write_bytes(content)


@cache
def _tokenizer_files() -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        tiny_tokenizer().save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def tiny_model(arch: str, folder: Path, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Path:
    """Write a random model of a SUPPORTED, ALSO_SUPPORTED or REFUSED architecture to ``folder`` as safetensors.

    The same arch, dtype and seed give the same weights, wide enough that greedy answers vary.
    """
    settings = {**_ENDS, **(SUPPORTED | ALSO_SUPPORTED | REFUSED)[arch]}
    config = AutoConfig.for_model(model_type(arch), **settings)
    factory = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.5 if "embed" in name or "wte" in name else 0.2)
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
