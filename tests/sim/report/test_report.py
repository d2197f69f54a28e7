"""The report's page: complete, self-contained, the same each time, and saying what the summary says."""

from dataclasses import replace

import pytest

from emberkv.sim.report import render_report
from emberkv.sim.run import Results
from emberkv.sim.simulator import SimulationEnd
from tests.sim.report.build import FIGURES, Page, run


@pytest.fixture(scope="module")
def results() -> Results:
    return run()


@pytest.fixture(scope="module")
def page(results: Results) -> Page:
    return Page(render_report({"chats": results}))


def test_every_figure_is_there_with_words_for_those_who_do_not_see_it(page: Page) -> None:
    assert [title for title in page.texts["h2"] if title not in ("All figures", "Settings")] == list(FIGURES)
    labels = [svg["aria-label"] for svg in page.of("svg")]
    assert [svg["role"] for svg in page.of("svg")] == ["img"] * 6
    assert page.texts["figcaption"] == labels
    assert page.unclosed == []


def test_the_page_needs_nothing_else(page: Page) -> None:
    assert not {"script", "link", "img", "iframe", "object"} & {name for name, _ in page.elements}
    policy = next(meta for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    references = [attributes[name] for _, attributes in page.elements for name in ("href", "xlink:href", "src")
                  if name in attributes]  # fmt: skip
    assert references
    assert all(str(each).startswith("#") for each in references)


def test_ids_are_unique_and_every_reference_has_one(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {str(use["xlink:href"])[1:] for use in page.of("use")}
    used |= {str(a["clip-path"])[5:-1] for _, a in page.elements if "clip-path" in a}
    assert used <= set(ids)


def test_it_opens_with_what_was_computed_the_verdict_and_the_main_figures(results: Results, page: Page) -> None:
    assert page.texts["h1"] == ["chats, simulated"]
    computed, verdict, *_ = page.texts["p"]
    assert computed.startswith("a machine given by its rates: 2 replicas, routed by expected-ttft, each with 128 M")
    assert verdict == results.load.sentence
    hit_rate = results.summary["prefix_caching"]["token_hit_rate"]
    assert page.texts["b"][0] == f"{hit_rate:.1%}"
    order = [name for name, _ in page.elements]
    assert order.index("b") < order.index("svg") < order.index("table")


def test_the_tables_have_the_summarys_figures_the_settings_and_the_seed(results: Results, page: Page) -> None:
    cells = dict(zip(page.texts["th"], page.texts["td"], strict=True))
    assert cells["token hit rate"] == f"{results.summary['prefix_caching']['token_hit_rate']:.2%}"
    assert cells["completed"] == "120"
    assert cells["kv blocks"] == "64"
    assert cells["seed"] == "1"  # the workload's; the simulation's comes before it
    assert page.texts["td"][page.texts["th"].index("seed")] == "5"


def test_the_same_run_gives_the_same_bytes() -> None:
    assert render_report({"chats": run()}) == render_report({"chats": run()})


def test_two_runs_are_drawn_on_the_same_axes_with_a_column_of_changes(results: Results) -> None:
    page = Page(render_report({"on": results, "off": run(prefix_caching=False)}))
    assert len(page.of("svg")) == 6
    assert page.texts["h1"] == ["on against off"]
    on, off = page.texts["figcaption"][0].split("\n")
    assert on.startswith("on: Of the prompt tokens")
    assert off.endswith("0.0% in all.")
    legend = {text for text in page.texts["text"] if ": " in text}
    assert {"on: hit rate", "off: hit rate", "on: p99", "off: p99"} <= legend
    assert page.texts["th"][1:4] == ["on", "off", "change"]
    rows = dict(zip(page.texts["th"][4:], zip(*[iter(page.texts["td"])] * 3, strict=False), strict=False))
    assert rows["hit rate, of prompt tokens"][1] == "0.0%"
    assert rows["hit rate, of prompt tokens"][2].endswith(" points")


def test_colours_are_the_pages_so_that_dark_mode_and_paper_change_them(page: Page) -> None:
    styles = [str(attributes.get("style", "")) for _, attributes in page.elements]
    assert any("var(--series-1)" in style for style in styles)
    assert not any("#0b4f8a" in style or "#010101" in style for style in styles)
    (css,) = page.texts["style"][:1]
    assert "prefers-color-scheme: dark" in css
    assert "@media print" in css


def test_without_time_there_is_no_plot_of_time_but_a_reason() -> None:
    page = Page(render_report({"hits": run(cache_only=True)}))
    undrawn = [title for title, words in zip(FIGURES, page.texts["figcaption"], strict=True) if "No time" in words]
    assert undrawn == list(FIGURES[1:4])
    assert len(page.of("svg")) == 3


def test_a_run_that_completed_nothing_still_has_a_page() -> None:
    page = Page(render_report({"none": run(stop_at=1e-6)}))
    assert "No request completed." in page.texts["figcaption"]


def test_an_interrupted_run_says_so(results: Results) -> None:
    cut = replace(results, ending=SimulationEnd(3.0, interrupted=True))
    assert Page(render_report({"cut": cut})).texts["p"][1].startswith("Interrupted")


def test_names_are_text_and_not_markup(results: Results) -> None:
    text = render_report({"<b>$x$ & co": results, "other": results})
    assert "<b>" not in text
    assert "&lt;b&gt;$x$ &amp; co" in text


def test_no_label_is_mathematical_markup(results: Results) -> None:
    assert "$" not in render_report({"chats": results})
