"""The report for people: one table of what was found, one of the fault sources."""

from __future__ import annotations

from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from farfault_shim.probe.survey import State, Survey

MARKS: Final = {State.OK: "[green]✓[/]", State.MISSING: "[red]✗[/]", State.OPTIONAL: "[dim]–[/]"}


def render(survey: Survey, console: Console) -> None:
    """Prints the report."""
    console.print(_items(survey))
    console.print(_sources(survey))
    if survey.hazards:
        console.print(_hazards(survey))
    source = survey.choice.source
    if source is None:
        console.print("[red]✗[/] no fault source works here; the remedies above say what is missing")
    else:
        console.print(f"[green]✓[/] fault source: [bold]{source.value}[/]")


def _table(title: str, columns: int) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        show_header=False,
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for _ in range(columns):
        table.add_column(overflow="fold")
    return table


def _items(survey: Survey) -> Table:
    table = _table("This host", 4)
    section = ""
    for item in survey.items:
        heading = "" if item.section == section else item.section
        section = item.section
        table.add_row(MARKS[item.state], heading, escape(item.name), _with_remedy(item.detail, item.remedy))
    return table


def _sources(survey: Survey) -> Table:
    table = _table("\nFault sources, best first", 3)
    for verdict in survey.choice.verdicts:
        chosen = verdict.source is survey.choice.source
        mark = MARKS[State.OK if chosen else State.OPTIONAL if verdict.works else State.MISSING]
        name = f"[bold]{verdict.source.value}[/]" if chosen else verdict.source.value
        table.add_row(mark, name, _with_remedy(verdict.reason, verdict.remedy))
    return table


def _hazards(survey: Survey) -> Table:
    table = _table("\nPages that KVM itself touches", 3)
    for hazard in survey.hazards:
        table.add_row(MARKS[State.OK if hazard.closed else State.MISSING], hazard.pages, hazard.detail)
    return table


def _with_remedy(detail: str, remedy: str) -> str:
    text = escape(detail)
    return f"{text}\n[dim]→ {escape(remedy)}[/]" if remedy else text
