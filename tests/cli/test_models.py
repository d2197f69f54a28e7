"""The models and size commands: what is said of a model before it is loaded, and what fits into memory."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind
from typer.testing import CliRunner

from emberkv.cli.main import app
from emberkv.cli.models import with_int8_kv
from emberkv.errors import ConfigError
from emberkv.sim.model_spec import ContextDemand, Precision, fit, fits, load_spec, parse_tokens
from tests.conftest import CheckpointFactory
from tests.gguf_models import write_gguf
from tests.models import CONTEXT

GIB = 2**30


def run(*arguments: str | Path, columns: int = 80) -> tuple[int, str]:
    outcome = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": str(columns)})
    return outcome.exit_code, outcome.stdout


def test_a_plain_model_is_described_by_its_figures(checkpoint: CheckpointFactory) -> None:
    code, output = run("models", checkpoint("llama"), "--device", "cpu", "--json")
    found = json.loads(output)
    assert code == 0
    assert (found["architecture"], found["stored_as"], found["computed_as"]) == ("llama", "float32", "float32")
    assert found["kv_bytes_per_token"] == 2 * 3 * 2 * 16 * 4
    assert found["int8_kv_bytes_per_token"] == 2 * 3 * 2 * (16 + 2)
    assert found["weight_bytes"] == found["parameters"] * 4
    assert found["quantised_bytes"]["int4"] < found["quantised_bytes"]["int8"] < found["weight_bytes"]
    assert found["context"] == CONTEXT
    assert found["fitting_tokens"] > CONTEXT
    assert found["refusal"] is None


def test_a_gguf_file_is_described_with_what_its_weights_are_held_in(
    checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    path = write_gguf(checkpoint("qwen2"), tmp_path / "small.gguf", lambda _: Kind.Q8_0)
    code, output = run("models", path, "--device", "cpu")
    assert code == 0
    lines = " ".join(output.split())
    assert "stored as GGUF, Q8_0; held in 8 bits, value by value" in lines
    assert "computed in bfloat16 on cpu" in lines
    assert "with --quantize" not in lines
    assert all(len(line) <= 80 for line in output.splitlines())


def test_a_model_that_is_refused_says_why_and_what_would_work(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    code, output = run("models", checkpoint("mamba"))
    assert code == 1
    assert "refused" in output
    assert "accepted are" in " ".join(output.split())
    config = json.loads((checkpoint("llama") / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, output = run("models", tmp_path)
    assert code == 1
    assert "quantised by bitsandbytes, which is not read; GPTQ, AWQ" in " ".join(output.split())


def test_a_tokenizer_that_cannot_be_followed_or_is_missing_is_said_before_loading(
    checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    path = write_gguf(checkpoint("qwen2"), tmp_path / "small.gguf", changed={"tokenizer.ggml.model": "t5"})
    code, output = run("models", path)
    assert code == 1
    assert "its tokenizer is of the kind 't5'; llama and gpt2 are read" in " ".join(output.split())
    folder = tmp_path / "folder"
    shutil.copytree(checkpoint("qwen2"), folder)
    (folder / "tokenizer.json").unlink()
    outcome = CliRunner().invoke(app, ["models", str(folder)])
    assert outcome.exit_code == 2
    assert f"{folder} has no tokenizer; it must hold one of tokenizer.json" in outcome.stderr


def test_a_model_that_is_not_there_is_an_error() -> None:
    outcome = CliRunner().invoke(app, ["models", "./nowhere"])
    assert outcome.exit_code == 2
    assert "no folder './nowhere' exists" in outcome.stderr


@pytest.mark.parametrize(
    ("text", "tokens"), [("32768", 32_768), ("200k", 200_000), ("128Ki", 131_072), ("1.5M", 1_500_000), ("4,096", 4096)]
)
def test_numbers_of_tokens_may_have_a_multiple(text: str, tokens: int) -> None:
    assert parse_tokens(text, "--context") == tokens


@pytest.mark.parametrize("text", ["", "many", "-1", "0", "3x", "k", "inf"])
def test_what_is_no_number_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--context is .*; use a number of tokens such as"):
        parse_tokens(text, "--context")


def test_what_fits_is_counted_in_tokens_beside_the_weights() -> None:
    choice = Precision("bf16", "bf16", weight_bytes=4 * GIB, kv_bytes_per_token=GIB // 10_000)
    per_token = choice.kv_bytes_per_token
    found = fit(choice, ContextDemand(context=30_000, users=2, shared=10_000), 4 * GIB + 60_000 * per_token)
    assert found.kv_bytes == 50_000 * per_token  # what is shared is kept once
    assert (found.fits, found.users, found.context) == (True, 2, 35_000)
    smaller = fit(choice, ContextDemand(context=30_000, users=2, shared=10_000), 4 * GIB + 40_000 * per_token)
    assert (smaller.fits, smaller.users, smaller.context) == (False, 1, 25_000)
    nothing = fit(choice, ContextDemand(context=30_000, users=2), 3 * GIB)
    assert (nothing.fits, nothing.users, nothing.context) == (False, 0, 0)


def test_kv_in_8_bits_is_offered_where_it_makes_a_demand_fit() -> None:
    wide = Precision("bf16", "bf16", weight_bytes=GIB, kv_bytes_per_token=256, options=" --dtype bfloat16")
    (first, second) = with_int8_kv([wide], 130)
    assert (first, second.kv, second.kv_bytes_per_token) == (wide, "int8", 130)
    assert second.options == " --dtype bfloat16 --kv-dtype int8"
    assert with_int8_kv([wide], None) == [wide]
    fitting = [each.fits for each in fits([first, second], ContextDemand(context=2**20), GIB + 200 * 2**20, 0)]
    assert fitting == [False, True]


def test_a_known_model_on_other_hardware() -> None:
    arguments = ("size", "llama-3.1-70b", "--context", "128Ki", "--users", "5", "--hardware", "h100", "--devices", "2")
    code, output = run(*arguments, "--json")
    choices = {(each["precision"]["weights"], each["precision"]["kv"]): each for each in json.loads(output)["choices"]}
    assert code == 0
    assert choices["bf16", "bf16"]["total_bytes"] == load_spec("llama-3.1-70b").weight_bytes + 5 * 131_072 * 327_680
    assert (choices["bf16", "bf16"]["fits"], choices["int4", "fp8"]["fits"]) == (False, True)
    _, output = run(*arguments)
    assert "It fits with int4 weights and fp8 KV." in " ".join(output.split())
    assert all(len(line) <= 80 for line in output.splitlines())


def test_a_known_model_takes_here_what_its_checkpoint_does_with_quantize() -> None:
    _, output = run("size", "emberkv-demo", "--context", "1k", "--json")
    sizes = {each["precision"]["weights"]: each["precision"]["weight_bytes"] for each in json.loads(output)["choices"]}
    _, output = run("models", str(files("emberkv") / "demo_model"), "--device", "cpu", "--json")
    held = json.loads(output)["quantised_bytes"]
    assert held == {name: pytest.approx(sizes[name], rel=0.02) for name in ("int8", "int4")}


def test_a_folder_on_this_machine_ends_with_a_command(checkpoint: CheckpointFactory) -> None:
    folder = checkpoint("llama")
    code, output = run("size", folder, "--context", "200k", "--users", "3")
    assert code == 0
    assert f"The model takes at most {CONTEXT:,} tokens" in " ".join(output.split())
    assert output.splitlines()[-1] == f"emberkv serve {folder} --cache-ram 9MiB"


def test_devices_are_of_hardware_that_is_named() -> None:
    outcome = CliRunner().invoke(app, ["size", "llama-3.1-8b", "--context", "1k", "--devices", "2"])
    assert outcome.exit_code == 2
    assert "--devices is 2; give --hardware with it" in outcome.stderr
