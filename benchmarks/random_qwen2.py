"""Writes a random Qwen2 model of about 57M parameters, for timing servers side by side.

    python -m benchmarks.random_qwen2 FOLDER

Speed depends on shapes, not on what the weights know, so random weights serve. The tokenizer is made for timing:
whatever greedy decoding chooses is visible text, so that a client that waits for the first text sees the first
token, and every word of the load client's list is one token, so that prompts have the length asked for.
"""

import argparse
import itertools
import random
import string
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from emberkv.bench.runner import WORDS

END = "<|endoftext|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPACE = "\u0120"  # how byte-level vocabularies write a leading space
VISIBLE = frozenset(string.printable) - frozenset(string.whitespace)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def alphabet() -> list[str]:
    """The special tokens and the 256 bytes, those that show nothing on their own first."""
    return [END, TURN_START, TURN_END, *sorted(ByteLevel.alphabet(), key=lambda letter: (letter in VISIBLE, letter))]


def words(rng: random.Random) -> itertools.chain[str]:
    """The load client's words, then made-up ones of 2 to 4 syllables without end."""
    syllables = [c + v for c, v in itertools.product("bdfghklmnprstvz", "aeiou")]
    made_up = ("".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in itertools.count())
    return itertools.chain(WORDS, made_up)


def vocabulary(size: int, rng: random.Random) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-pair vocabulary of ``size`` pieces that is a tree of words: each piece is one letter more than its parent.

    Merges start only from a leading space, so a word is one token whenever its last letter is in the tree.
    """
    vocab = {piece: i for i, piece in enumerate(alphabet())}
    merges: list[tuple[str, str]] = []
    for word in words(rng):
        piece = SPACE
        for letter in word:
            if len(vocab) == size:
                return vocab, merges
            parent, piece = piece, piece + letter
            if piece not in vocab:
                vocab[piece] = len(vocab)
                merges.append((parent, letter))
    raise AssertionError("the made-up words never end")


def make_tokenizer(size: int, context: int, rng: random.Random) -> Qwen2Tokenizer:
    vocab, merges = vocabulary(size, rng)
    return Qwen2Tokenizer(
        vocab=vocab, merges=merges, unk_token=END, eos_token=END, pad_token=END,
        additional_special_tokens=[TURN_START, TURN_END],
        model_max_length=context, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def make_model(config: Qwen2Config, seed: int) -> Qwen2ForCausalLM:
    """Random bf16 weights, but zero rows (so a logit of 0) for ids without visible text: greedy never picks those."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    invisible = sum(piece not in VISIBLE for piece in alphabet())
    with torch.no_grad():
        model.get_input_embeddings().weight[:invisible] = 0
    return model.to(torch.bfloat16)


def write_model(
    folder: Path, *, hidden: int = 512, heads: int = 8, kv_heads: int = 2, intermediate: int = 2176, layers: int = 8,
    vocab: int = 49152, context: int = 32768, seed: int = 0,
) -> int:  # fmt: skip
    """Writes weights, config and tokenizer into ``folder`` and returns the number of parameters.

    heads and kv_heads share ``hidden``: a head has hidden / heads dimensions. context is in tokens.
    """
    config = Qwen2Config(
        hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=intermediate, num_hidden_layers=layers, vocab_size=vocab,
        max_position_embeddings=context, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = make_model(config, seed)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    make_tokenizer(vocab, context, random.Random(seed)).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def ensure_model(folder: Path) -> Path:
    """The default model in ``folder``, written there if there is none yet."""
    if not (folder / "config.json").exists():
        write_model(folder)
    return folder


def ensure_half_billion(work: Path) -> Path:
    """A model of Qwen2.5-0.5B's shape, 494M parameters, in a folder of ``work``, written there if there is none yet."""
    folder = work / "random-qwen2-0.5b"
    if not (folder / "config.json").exists():
        write_model(folder, hidden=896, heads=14, kv_heads=2, intermediate=4864, layers=24, vocab=151936)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, default in (
        ("hidden", 512), ("heads", 8), ("kv-heads", 2), ("intermediate", 2176), ("layers", 8),
        ("vocab", 49152), ("context", 32768), ("seed", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    given = vars(parser.parse_args())
    folder = given.pop("folder")
    print(f"{folder}: {write_model(folder, **given) / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main()
