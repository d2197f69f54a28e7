"""The builder: a small simulation of chats, and the page of it read back."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from emberkv.sim.config import Rates, SimulationConfig, Workload
from emberkv.sim.run import Results, run_simulation
from tests.workload.build import workload

FIGURES = (
    "Hit rate over time", "Time to first token over time", "Time to first token, cached and not", "Memory by tier",
    "Load per replica", "Hit rate against capacity",
)  # fmt: skip


def run(**changes: Any) -> Results:
    """40 conversations on two replicas of 64 blocks of 16 tokens."""
    config = {
        "rates": Rates(per_prefill_token=1e-3, per_decode_token=1e-3), "kv_blocks": 64, "block_size": 16, "replicas": 2,
        "seed": 5, **changes,
    }  # fmt: skip
    client = {"message": 120, "output": 30}
    return run_simulation(
        SimulationConfig(**config), Workload(workload(sessions=40, client=client), None, Path()), keep_ids=True
    )


class Page(HTMLParser):
    """What a page has: its elements with their attributes, and the text of each kind of element."""

    VOID = frozenset({"meta", "path", "use", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def unclosed(self) -> list[str]:
        return self._open
