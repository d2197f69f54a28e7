"""Writes the table of architectures in docs/models.md: `python -m tests.architecture_table`.

Its rows are the models of the tests that compare hits with cold runs bit by bit, and logits with transformers' own.
"""

from pathlib import Path

from transformers import AutoConfig

from emberkv.engine.torch.model.inspection import ModelShape, inspect_model
from tests.architectures import ALSO_SUPPORTED, BY_BLOCKS, BY_CHUNKS, MULTIMODAL, SUPPORTED, model_type

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- architectures: begin -->\n", "<!-- architectures: end -->\n"


def table() -> str:
    """The table in Markdown, a line an architecture."""
    lines = ["| model type | besides plain attention | hits end at |", "|---|---|---|"]
    for arch, settings in sorted((SUPPORTED | ALSO_SUPPORTED).items()):
        shape = inspect_model(AutoConfig.for_model(model_type(arch), **{**settings, "pad_token_id": 0}))
        unless_by_chunks = "a block or a checkpoint" if arch in BY_BLOCKS else "any token"
        end = "a whole prefill chunk" if arch in BY_CHUNKS else unless_by_chunks
        kind = model_type(arch)
        variant = arch.removeprefix(kind).removeprefix("-")
        name = f"`{kind}` ({variant.replace('_', ' ')})" if variant else f"`{kind}`"
        lines.append(f"| {name} | {', '.join(_features(shape))} | {end} |")
    text_only = ", ".join(f"`{name}`" for name in MULTIMODAL)
    return "\n".join([*lines, "", f"Of these multimodal types the text model is served: {text_only}.", ""])


def _features(shape: ModelShape) -> list[str]:
    layers = shape.geometry.layers
    known = {
        "sliding windows": any(layer.window and not layer.window.chunked for layer in layers),
        "chunked attention": any(layer.window and layer.window.chunked for layer in layers),
        "layers that share KV": any(layer.shares is not None for layer in layers),
        "per-layer head counts or sizes": shape.geometry.heads_differ,
        "soft caps": any(layer.softcap for layer in layers),
        "ALiBi": any(layer.alibi for layer in layers),
        "sinks": any(layer.sinks for layer in layers),
        "latent KV (MLA)": any("kv_b_proj" in name for name in shape.shapes),
        "short convolutions": any(not state.heads for state in shape.geometry.states),
        "Mamba-2": any(name.endswith(".D") for name in shape.shapes),
        "gated delta nets": any(name.endswith("linear_attn.A_log") for name in shape.shapes),
        "experts": any(len(each) == 3 and each[1] > 1 for each in shape.shapes.values()),
    }
    return [name for name, there in known.items() if there]


def document() -> str:
    """docs/models.md with the table as it should be."""
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    DOCUMENT.write_text(document())
