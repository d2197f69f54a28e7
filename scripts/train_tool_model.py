"""Train the tests' model that calls tools, from scratch, on one core in a few minutes.

The result is a Llama-shaped model of about 150,000 parameters with a chat template in the Hermes format, written as a
folder that ``transformers`` and emberkv both load:

    python scripts/train_tool_model.py --out tests/data/tool_model

It learns from generated conversations about cities: with the tool that a question needs, and others beside it, it calls
that tool, and then repeats the result in a sentence; without tools it says that it has none. Where only other tools are
given it should say so as well, but mostly calls a tool, and that is left out of the check. One in five pairs of a tool
and a city is held out. The script fails if a token of any other answer about held-out pairs is not the most likely one.

Needs ``torch``, ``tokenizers`` and ``transformers``.
"""

import argparse
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
MARKUP = ("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
NOT_AN_ANSWER = -100

CHAT_TEMPLATE = """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- if tools or system -%}
{{- '<|im_start|>system\\n' + system -}}
{%- if tools -%}
{{- '\\n\\n' if system -}}
{{- '# Tools\\n<tools>' -}}
{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
{{- '\\n</tools>\\nWrite a call as:\\n<tool_call>\\n{"name": NAME, "arguments": OBJECT}\\n</tool_call>' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages if message.role != 'system' -%}
{%- if message.role == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') -}}
{%- for call in message.tool_calls or [] -%}
{{- '\\n' if message.content or not loop.first -}}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
{{- (call.function.arguments | tojson) + '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

CITIES = (
    "Amsterdam", "Athens", "Berlin", "Bern", "Brussels", "Budapest", "Cairo", "Copenhagen", "Dublin", "Hanoi",
    "Helsinki", "Istanbul", "Lagos", "Lima", "Lisbon", "London", "Madrid", "Manila", "Nairobi", "Oslo", "Paris",
    "Prague", "Quito", "Riga", "Rome", "Seoul", "Sofia", "Stockholm", "Tallinn", "Tokyo", "Vienna", "Warsaw",
)  # fmt: skip
SYSTEM_PROMPTS = ("", "", "You are helpful.", "Answer questions.")
GREETINGS = (("Hello!", "Hello! Ask me about a city."), ("Thank you.", "You are welcome."))
NO_TOOL = "I have no tool for that."


@dataclass(frozen=True)
class Skill:
    """A tool with one string argument, the questions that need it, and its results."""

    name: str
    argument: str
    description: str
    questions: tuple[str, ...]
    results: tuple[str, ...]

    def schema(self, description: str | None) -> dict[str, Any]:
        """Return the tool as chat templates expect it. description: None leaves it out."""
        properties = {self.argument: {"type": "string"}}
        parameters = {"type": "object", "properties": properties, "required": [self.argument]}
        described = {} if description is None else {"description": description}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": parameters}}


SKILLS = (
    Skill(
        "get_weather", "city", "The weather in a city.",
        ("What is the weather in {}?", "Tell me the weather in {}."),
        ("sunny", "rainy", "cloudy", "windy", "foggy", "cold", "warm", "dry"),
    ),
    Skill(
        "get_time", "place", "The time of day in a place.",
        ("What is the time in {}?", "Tell me the time in {}."),
        ("morning", "noon", "afternoon", "evening", "night", "midnight", "dawn", "dusk"),
    ),
    Skill(
        "find_river", "town", "The river of a town.",
        ("What is the river in {}?", "Tell me the river in {}."),
        ("Danube", "Rhine", "Seine", "Thames", "Tiber", "Nile", "Elbe", "Spree"),
    ),
)  # fmt: skip


def is_held_out(skill: Skill, city: str) -> bool:
    """Whether no training conversation asks this of that city."""
    return (CITIES.index(city) + 2 * SKILLS.index(skill)) % 5 == 0


def round_of(skill: Skill, city: str, has_tool: bool, rng: random.Random) -> list[dict[str, Any]]:
    """Return a question's messages up to the answer, with the call and its result where the tool is given."""
    question = {"role": "user", "content": rng.choice(skill.questions).format(city)}
    if not has_tool:
        return [question, {"role": "assistant", "content": NO_TOOL}]
    result = rng.choice(skill.results)
    call = {"type": "function", "function": {"name": skill.name, "arguments": {skill.argument: city}}}
    return [
        question,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": f"It is {result}."},
    ]


def conversation(rng: random.Random, held_out: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the messages and the tools of a random conversation. held_out: ask about held-out pairs only."""
    given = rng.sample(SKILLS, rng.choice((0, 1, 1, 2, 2, 3)))
    tools = [skill.schema(rng.choice((skill.description, "", None))) for skill in given]
    system = rng.choice(SYSTEM_PROMPTS)
    messages = [{"role": "system", "content": system}] if system else []
    if rng.random() < 0.1:
        asked, answer = rng.choice(GREETINGS)
        return [*messages, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}], tools
    skill = rng.choice(given) if given and rng.random() < 0.8 else rng.choice(SKILLS)
    city = rng.choice([city for city in CITIES if is_held_out(skill, city) == held_out])
    return messages + round_of(skill, city, skill in given, rng), tools


def make_tokenizer(rng: random.Random, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that can encode any text; each word of the conversations is one token."""
    tokenizer = Tokenizer(models.BPE())
    # A word never takes the space before it, so it is the same token in a question and in JSON.
    pieces = pre_tokenizers.Split(Regex(r"\w+|\n|[^\w\n]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (PAD, START, END)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(MARKUP),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    render = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE)
    texts = []
    for held_out in (False, True):
        for _ in range(1500):
            messages, tools = conversation(rng, held_out)
            texts.append(render.apply_chat_template(messages, tools=tools or None, tokenize=False))
    for token in (START, END, *MARKUP):  # tokens of their own, of which the merges shall not be learned
        texts = [text.replace(token, "\n") for text in texts]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, eos_token=END, pad_token=PAD
    )


Batch = tuple[Tensor, Tensor]
"""Tokens and targets, each [rows, longest]; a target is set where the assistant's turn goes on."""


class Sampler:
    """Encodes random conversations in batches. held_out: of held-out pairs, and none that lacks only the right tool."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: random.Random, held_out: bool) -> None:
        self._tokenizer = tokenizer
        self._rng = rng
        self._held_out = held_out
        header = f"{START}assistant\n"
        self._header: list[int] = tokenizer.encode(header, add_special_tokens=False)

    def batches(self, rows: int) -> Iterator[Batch]:
        """Yield batches without end, each of conversations of about the same length, so that little is padded."""
        while True:
            encoded = sorted((self._encode() for _ in range(rows * 8)), key=lambda pair: len(pair[0]))
            batches = [self._padded(encoded[start : start + rows]) for start in range(0, len(encoded), rows)]
            self._rng.shuffle(batches)
            yield from batches

    def _padded(self, encoded: Sequence[tuple[list[int], list[int]]]) -> Batch:
        width = max(len(ids) for ids, _ in encoded)
        pad = self._tokenizer.pad_token_id
        tokens = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in encoded])
        targets = torch.tensor([aims + [NOT_AN_ANSWER] * (width - len(aims)) for _, aims in encoded])
        return tokens, targets

    def _encode(self) -> tuple[list[int], list[int]]:
        messages, tools = conversation(self._rng, self._held_out)
        while self._held_out and tools and messages[-1]["content"] == NO_TOOL:
            messages, tools = conversation(self._rng, self._held_out)
        text = self._tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        targets = [NOT_AN_ANSWER] * len(ids)
        for start in self._answers(ids):
            end = ids.index(self._tokenizer.eos_token_id, start)
            targets[start - 1 : end] = ids[start : end + 1]
        return ids, targets

    def _answers(self, ids: Sequence[int]) -> Iterator[int]:
        size = len(self._header)
        return (at + size for at in range(len(ids)) if ids[at : at + size] == self._header)


def answer_logits(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits of the tokens of answers, [tokens, vocabulary], and the right tokens."""
    tokens, targets = batch
    scored = targets != NOT_AN_ANSWER
    hidden = model.model(tokens, use_cache=False).last_hidden_state
    return model.lm_head(hidden[scored]), targets[scored]


def train(model: LlamaForCausalLM, sampler: Sampler, steps: int, rows: int, peak_rate: float) -> None:
    """Train on fresh conversations, with a linear warm-up and a cosine decay of the learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step, batch in enumerate(islice(sampler.batches(rows), steps)):
        share = 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = peak_rate * share * min(1.0, (step + 1) / 50)
        loss = functional.cross_entropy(*answer_logits(model, batch))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 25 == 24:
            print(f"step {step + 1} loss {loss.item():.5f}", flush=True)


@torch.no_grad()
def check(model: LlamaForCausalLM, batches: Iterator[Batch]) -> tuple[int, int, float]:
    """Return how many tokens of answers are not the most likely, of how many, and the least lead of a right one."""
    wrong, count, least = 0, 0, math.inf
    for batch in batches:
        logits, right = answer_logits(model, batch)
        rivals = logits.scatter(1, right[:, None], -math.inf).amax(1)
        lead = logits.gather(1, right[:, None])[:, 0] - rivals
        wrong += int((lead <= 0).sum())
        count += len(right)
        least = min(least, float(lead[lead > 0].min()))
    return wrong, count, least


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the folder: weights in bfloat16, their configuration, the tokenizer and its settings."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # the writer leaves it readable by its owner only
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    config = {**model.config.to_diff_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    for name, value in (("config.json", config), ("tokenizer_config.json", settings)):
        (out / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the tests' model that calls tools.")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rows", type=int, default=16, help="conversations in a step")
    parser.add_argument("--rate", type=float, default=4e-3, help="the highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train the tokenizer and the model, write the folder, and check the model on held-out pairs."""
    args = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(random.Random(args.seed), vocab_size=768)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.1,  # the usual 0.02 is for wider models; here attention would take long to form
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters()} parameters, {len(tokenizer)} tokens in the vocabulary", flush=True)
    train(model, Sampler(tokenizer, random.Random(args.seed + 1), held_out=False), args.steps, args.rows, args.rate)
    model = model.to(torch.bfloat16)
    export(model, tokenizer, args.out)
    sampler = Sampler(tokenizer, random.Random(args.seed + 2), held_out=True)
    wrong, tokens, lead = check(model, islice(sampler.batches(args.rows), 32))
    print(f"held-out pairs: {wrong} of {tokens} tokens are wrong, and the least lead of a right one is {lead:.2f}")
    if wrong:
        raise SystemExit("the model has not learned its task; train it with more --steps")


if __name__ == "__main__":
    main()
