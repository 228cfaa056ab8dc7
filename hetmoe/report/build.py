"""From a sweep's record to the files of its report."""

from collections.abc import Sequence

from hetmoe.report import facts, tables
from hetmoe.report.figures import (
    ReportFigure,
    bits_figures,
    condition_slug,
    fraction_figures,
    noise_figures,
    time_figures,
)  # fmt: skip
from hetmoe.report.groups import Groups, group
from hetmoe.report.page import Picture, Section, render_page
from hetmoe.report.pareto import pareto_figures
from hetmoe.report.render import to_files, with_settings
from hetmoe.report.score_maps import checked_map, score_maps
from hetmoe.report.svg import inline
from hetmoe.sweep.store import SweepRecord

PAGE = "index.html"


def build_report(record: SweepRecord) -> dict[str, bytes]:
    """The report's files by name: the page, every figure as PNG and SVG, every table as CSV.

    The same record gives the same bytes.

    Raises:
        InputError: for a record without results, or with numbers that are not finite.
    """
    return with_settings(lambda: _build(record))


def _build(record: SweepRecord) -> dict[str, bytes]:
    groups = group(record)
    maps = {rule: checked_map(rule, scores) for rule, scores in record.scores.items()}
    if record.frequencies is not None and "activation_frequency" not in maps:
        maps["activation frequency"] = checked_map("activation frequency", record.frequencies)
    files = tables.csv_files(groups, maps, record.failures)
    sections = [
        Section(anchor="model", title="Model and text", level=2, facts=facts.model_facts(record)),
        Section(
            anchor="sweep",
            title="What was swept",
            level=2,
            paragraphs=[_seeds(record)],
            facts=facts.sweep_facts(record),
        ),
    ]
    if record.failures:
        sections.append(
            Section(
                anchor="failed", title="Failed points", level=2, facts=facts.failure_facts(record), files=["failed.csv"]
            )
        )  # fmt: skip
    pareto = [tables.fronts(groups, condition) for condition in groups.conditions]
    for anchor, title, drawn, absent in (
        ("noise", "Quality against noise scale", noise_figures(groups), "no condition has results at two noise scales"),
        ("fraction", "Quality against digital fraction", fraction_figures(groups), "no rule has results"),
        ("time", "Quality against time since programming", time_figures(groups), "one time was swept"),
        ("bits", "Quality against converter bits", bits_figures(groups), "one number of bits was swept"),
        ("scores", "Scores of the experts", score_maps(record, groups.fractions), "the sweep has no scored rule"),
        ("pareto", "Parameters kept digital against quality", pareto_figures(groups), "no placement has results"),
    ):
        sections += _figure_sections(anchor, title, drawn, absent, files)
        if anchor == "scores" and (table := tables.correlations(maps)) is not None:
            sections.append(
                Section(
                    anchor="rank-correlation", title="Rank correlation of the rules", level=3,
                    tables=[table], files=["spearman.csv"],
                )
            )  # fmt: skip
        if anchor == "pareto" and pareto:
            sections.append(Section(anchor="fronts", title="Fronts", level=3, tables=pareto, files=["pareto.csv"]))
    sections += _table_sections(groups)
    sections.append(
        Section(anchor="provenance", title="Provenance", level=2, facts=facts.provenance_facts(record))
    )  # fmt: skip
    status = facts.progress(record)
    page = render_page(
        f"hetmoe sweep: {record.model.get('name')}",
        status,
        finished=len(record.results) >= record.points,  # and so without failures
        sections=sections,
    )
    return {**files, PAGE: page.encode()}


def _seeds(record: SweepRecord) -> str:
    grid = record.config.get("grid", {})
    return (
        f"Noise seeds: {grid.get('seeds')} from base seed {grid.get('seed')}. The same seed index means the same noise "
        "draws for every placement. Placements that no seed changes (no noise, nothing drawn) are evaluated once."
    )


def _figure_sections(
    anchor: str, title: str, figures: Sequence[ReportFigure], absent: str, files: dict[str, bytes]
) -> list[Section]:
    if not figures:
        return [Section(anchor=anchor, title=title, level=2, paragraphs=[f"No figure: {absent}."])]
    sections = [Section(anchor=anchor, title=title, level=2)]
    for number, figure in enumerate(figures):
        name = figure.name if f"{figure.name}.svg" not in files else f"{figure.name}-{number}"
        files[f"{name}.png"], files[f"{name}.svg"] = to_files(figure.figure)
        picture = Picture(
            svg=inline(files[f"{name}.svg"].decode(), name, figure.caption),
            min_width=round(figure.figure.get_figwidth() * 68),  # text of 10 points stays 9 pixels high
            caption=figure.caption,
            files=[f"{name}.png", f"{name}.svg"],
        )
        sections.append(Section(anchor=f"figure-{name}", title=figure.title, level=3, pictures=[picture]))
    return sections


def _table_sections(groups: Groups) -> list[Section]:
    sections = [
        Section(
            anchor="tables",
            title="Tables",
            level=2,
            paragraphs=[
                "Differences are paired by noise seed, which removes the spread that both placements share.",
                "Intervals are Student's t at 95 %, each on its own (not corrected for the number of comparisons).",
            ],
            files=["means.csv", "differences.csv"],
        )
    ]
    for condition in groups.conditions:
        name = condition_slug(condition)
        sections.append(
            Section(
                anchor=f"means-{name}", title=f"Means: {condition.label}", level=3,
                tables=tables.means(groups, condition),
            )
        )  # fmt: skip
        if found := tables.differences(groups, condition):
            sections.append(
                Section(
                    anchor=f"differences-{name}", title=f"Paired differences: {condition.label}", level=3, tables=found
                )
            )  # fmt: skip
    return sections
