"""``emberkv explain --template``: what of a conversation's cache the model's chat template lets the next turn reuse."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from emberkv.errors import ConfigError
from emberkv.serving.parsing.formats import AUTO
from emberkv.serving.template_study import TemplateStudy, Transition, study_template, study_tokenizer, template_renderer


def explain_template(source: str, *, as_json: bool) -> None:
    """Print the study of a model's template, in tokens, or of a template in a file, in characters.

    Raises EmberError where the model or its template cannot be read.
    """
    try:
        from emberkv.engine.torch.model.loader import load_tokenizer  # noqa: PLC0415 - imports PyTorch
        from emberkv.serving.lifecycle import chosen_output_format  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--template needs the torch extra ({error.name} is missing): pip install '.[torch]' in emberkv's folder"
        ) from error
    is_file = Path(source).expanduser().is_file()
    tokenizer = load_tokenizer(str(files("emberkv") / "demo_model"), source) if is_file else load_tokenizer(source)
    if tokenizer.chat_problem is not None:
        raise ConfigError(f"--template {source}: {tokenizer.chat_problem}")
    plain, thoughtful = (
        study_template(template_renderer(tokenizer), _characters, with_thoughts=with_thoughts)
        if is_file
        else study_tokenizer(tokenizer, with_thoughts=with_thoughts)
        for with_thoughts in (False, True)
    )
    formats = chosen_output_format(tokenizer, AUTO, AUTO)
    unit = "characters" if is_file else "tokens"
    if as_json:
        studies = {"without_thoughts": asdict(plain), "with_thoughts": asdict(thoughtful)}
        said = {"tools": formats.tools, "reasoning": formats.reasoning, "unit": unit, **studies}
        typer.echo(json.dumps(said, ensure_ascii=False, indent=1))
        return
    console = Console(markup=False, highlight=False)
    console.print(f"{source}\n{formats}\n")
    if plain.problem:
        console.print(f"The template does not take an agent's conversation: {plain.problem}")
        return
    console.print(f"What the next turn reuses of the {unit} that a turn has computed:\n")
    console.print(_table(plain, thoughtful))
    for line in _remarks(plain, thoughtful):
        console.print(f"\n{line}")


def _characters(text: str) -> Sequence[int]:
    return [ord(char) for char in text]


def _table(plain: TemplateStudy, thoughtful: TemplateStudy) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("", "without thoughts", "with thoughts")
    table.add_row("next step of a tool loop", _cell(plain.worst_step), _cell(thoughtful.worst_step))
    table.add_row("next question", _cell(plain.question), _cell(thoughtful.question))
    return table


def _cell(transition: Transition | None) -> str:
    if transition is None:
        return "refused"
    if transition.is_whole:
        return f"all {transition.computed:,}"
    return f"{transition.kept:,} of {transition.computed:,}: to {transition.differs_in}"


def _remarks(plain: TemplateStudy, thoughtful: TemplateStudy) -> list[str]:
    remarks = []
    if not plain.shows_calls:
        remarks.append("The template leaves out the calls that the model has made.")
    if thoughtful.problem:
        remarks.append(f"With thoughts, the template refuses the conversation: {thoughtful.problem}")
    elif not thoughtful.shows_thoughts:
        remarks.append("The template leaves out thoughts: where the model writes them, each answer is computed again.")
    return remarks
