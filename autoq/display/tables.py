"""Stored data as tables of at most 80 columns, plain where the output is no terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from autoq.display import numbers
from autoq.display.compare import foretold, gains, sort_objective

if TYPE_CHECKING:
    from autoq.search.sampler_view import SamplerView
    from autoq.shipping.verify import Check
    from autoq.store import StudyRecord, StudySummary, TrialRecord

_SPLIT_ABOVE = 11  # longer headers are set in two lines


def console(stderr: bool = False) -> Console:
    """Where tables go. Width is the terminal's, 80 where there is none; NO_COLOR is respected."""
    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def plain(headers: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> Table:
    """A borderless table; the columns in `right` are set to the right. Cells are text, never markup."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, header in enumerate(headers):
        table.add_column(Text(header), justify="right" if index in right else "left", no_wrap=index in right)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _header(name: str) -> str:
    """A long name in two lines, broken at the underscore nearest to its middle."""
    breaks = [index for index, letter in enumerate(name) if letter == "_"]
    if len(name) <= _SPLIT_ABOVE or not breaks:
        return name
    middle = min(breaks, key=lambda index: abs(index - len(name) / 2))
    return f"{name[: middle + 1]}\n{name[middle + 1 :]}"


def _columns(study: StudyRecord, trials: Sequence[TrialRecord]) -> list[str]:
    """The study's objectives, then what else was measured."""
    names = [objective.name for objective in study.objectives]
    more = {name for trial in trials for name, _ in trial.measurements}
    return [*names, *sorted(more - set(names))]


def _cells(trial: TrialRecord, names: Sequence[str], reported: set[str], errors: bool) -> list[str]:
    best = trial.best_measurements()
    cells = []
    for name in names:
        measurement = best.get(name)
        if measurement is None:
            cells.append("")
            continue
        stderr = measurement.stderr if errors else None
        text = numbers.with_error(measurement.value, stderr, measurement.unit)
        cells.append(text + numbers.mark(measurement, name in reported))
    return cells


def _origin(trial: TrialRecord) -> str:
    return trial.baseline or (trial.origin if trial.parent is None else f"{trial.origin} {trial.parent}")


def _measured_table(
    trials: Sequence[TrialRecord], marks: dict[int, str], names: Sequence[str], errors: bool
) -> tuple[Text, int]:
    """The table as one text, and its width. Laid out here: a general layout takes longer than the query."""
    reported = {name for trial in trials for name, part in trial.measurements if part == "report"}
    marked = any(marks.values())
    columns = [_right(["trial"]), *([_left([""])] if marked else []), _left(["origin"])]
    columns += [_right(_header(name).split("\n")) for name in names]
    for trial in trials:
        cells = [str(trial.number), *([marks.get(trial.number, "")] if marked else []), _origin(trial)]
        for column, cell in zip(columns, [*cells, *_cells(trial, names, reported, errors)], strict=True):
            column.cells.append(cell)
    height = max(len(column.header) for column in columns)
    padded = [[""] * (height - len(column.header)) + column.header + column.cells for column in columns]
    widths = [max(map(len, cells)) for cells in padded]
    text = Text(no_wrap=True)
    styles = ["bold"] * height + ["" if trial.on_frontier else "dim" for trial in trials]
    for index, style in enumerate(styles):
        cells = [
            cells[index].rjust(width) if column.right else cells[index].ljust(width)
            for column, cells, width in zip(columns, padded, widths, strict=True)
        ]
        text.append("  ".join(cells).rstrip() + ("\n" if index + 1 < len(styles) else ""), style)
    return text, sum(widths) + 2 * (len(widths) - 1)


@dataclass
class _Column:
    header: list[str]
    right: bool
    cells: list[str] = field(default_factory=list)


def _right(header: list[str]) -> _Column:
    return _Column(header, right=True)


def _left(header: list[str]) -> _Column:
    return _Column(header, right=False)


def _fitting(
    trials: Sequence[TrialRecord], marks: dict[int, str], names: Sequence[str], out: Console
) -> tuple[Text, bool]:
    """The table with errors where it fits the width, else without; and whether they are there."""
    table, width = _measured_table(trials, marks, names, errors=True)
    if width <= out.width:
        return table, True
    return _measured_table(trials, marks, names, errors=False)[0], False


def frontier(
    study: StudyRecord,
    points: Sequence[TrialRecord],
    baselines: Sequence[TrialRecord],
    out: Console,
    limited: bool = False,
    ties: Mapping[int, Sequence[int]] | None = None,
    remarks: Sequence[str] = (),
) -> list[RenderableType]:
    """The frontier and, beside it, every baseline, with a legend, what the search gained, and `remarks`.

    `points` are the frontier's trials to show, `limited` to those within somebody's limits. Sorted by
    the first objective that is a size, else by the last one. `ties` maps a trial's number to those that it
    is no better than.
    """
    nothing = Text(f"study {study.name}: no feasible trial is {'within the limits' if limited else 'complete yet'}")
    if not points and not baselines:
        return [nothing]
    shown = {trial.number: trial for trial in [*baselines, *points]}
    key = sort_objective(study.objectives).name
    rows = sorted(shown.values(), key=lambda trial: (trial.best_measurements()[key].value, trial.number))
    marks = {trial.number: "-" if not trial.on_frontier else "" for trial in rows} | _tied(rows, ties or {})
    names = _columns(study, rows)
    table, errors = _fitting(rows, marks, names, out)
    parts: list[RenderableType] = [table]
    if legend := _legend(rows, marks, names, errors):
        parts += [Text(), *(Text(line, style="dim") for line in legend)]
    if not points:
        parts += [Text(), nothing]
    if found := gains(points, baselines, study.objectives):
        parts += [Text(), *(Text(str(gain)) for gain in found)]
    if known := foretold(rows):
        parts += [Text(), *(Text(str(each), style="dim") for each in known)]
    if remarks:
        parts += [Text(), *(Text(remark, style="dim") for remark in remarks)]
    return parts


def _tied(rows: Sequence[TrialRecord], ties: Mapping[int, Sequence[int]]) -> dict[int, str]:
    """Marks of the trials that are no better than another: `~` for the row above, else `~` and that one's number."""
    marks = {}
    numbers = [trial.number for trial in rows]
    for place, number in enumerate(numbers):
        # The nearest above; below only where the order is not that of an exact quantity.
        found = [other for other in [*reversed(numbers[:place]), *numbers[place:]] if other in ties.get(number, ())]
        if found:
            marks[number] = "~" if place and found[0] == numbers[place - 1] else f"~{found[0]}"
    return marks


def _legend(rows: Sequence[TrialRecord], marks: dict[int, str], names: Sequence[str], errors: bool) -> list[str]:
    reported = {name for trial in rows for name, part in trial.measurements if part == "report"}
    used = {
        numbers.mark(measurement, name in reported)
        for trial in rows
        for name, measurement in trial.best_measurements().items()
    }
    uncertain = any(m.stderr is not None for trial in rows for m in trial.best_measurements().values())
    lines = []
    if uncertain and errors:
        lines.append("±  one standard error")
    if uncertain and not errors:
        lines.append("standard errors are left out for want of width; --json has them")
    if "p" in used:
        lines.append("p  predicted, not measured")
    if "e" in used:
        lines.append("e  estimated from operations and bytes, not metered")
    if "s" in used:
        lines.append("s  measured on the search part of the data only")
    if "-" in marks.values():
        lines.append("-  a baseline that is not on the frontier")
    if any(mark.startswith("~") for mark in marks.values()):
        lines.append("~  beyond noise no better than the row above, or than the trial of that number")
    return lines


def trials(study: StudyRecord, rows: Sequence[TrialRecord], out: Console) -> list[RenderableType]:
    """Trials in the order given, with what came of each."""
    if not rows:
        return [Text(f"study {study.name}: no such trials")]
    marks = {
        trial.number: {"complete": "*" if trial.on_frontier else ""}.get(trial.state, trial.state) for trial in rows
    }
    marks |= {trial.number: "infeasible" for trial in rows if trial.feasible is False and trial.state == "complete"}
    marks |= {trial.number: f"= {trial.duplicate_of}" for trial in rows if trial.state == "duplicate"}
    names = _columns(study, rows)
    table, errors = _fitting(rows, marks, names, out)
    parts: list[RenderableType] = [table]
    legend = ["*  on the frontier"] if any(trial.on_frontier for trial in rows) else []
    legend += _legend(rows, marks, names, errors)
    if any(trial.state == "stopped" for trial in rows):
        legend.append("stopped  given up as worse than a finished trial; values so far")
    if legend:
        parts += [Text(), *(Text(line, style="dim") for line in legend)]
    failed = [trial for trial in rows if trial.error is not None]
    if failed:
        parts += [Text(), *(Text(f"trial {t.number}: {t.error.type}: {t.error.message}") for t in failed if t.error)]
    return parts


def studies(rows: Sequence[StudySummary]) -> list[RenderableType]:
    """All studies, one line each."""
    if not rows:
        return [Text("no studies yet; run: autoq search demo")]
    cells = [
        [
            str(row.id),
            row.name,
            row.state + (f", {row.workers} at it" if row.workers else ""),
            str(row.complete)
            + (f" +{row.stopped} stopped" if row.stopped else "")
            + (f" +{row.failed} failed" if row.failed else ""),
            str(row.frontier),
            row.model,
            _moment(row.created_at),
        ]
        for row in rows
    ]
    return [plain(["id", "study", "state", "trials", "frontier", "model", "created"], cells, right=(0, 4))]


def sampler_views(views: Mapping[str, SamplerView | None]) -> list[RenderableType]:
    """Study -> what its sampler's predictions were worth, one line each for those that have any."""
    lines = [Text(f"{name}: {view}", style="dim") for name, view in views.items() if view is not None]
    return [Text(), *lines] if lines else []


def _moment(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M")


def choices(rows: Sequence[tuple[str, str]], what: str) -> list[RenderableType]:
    """Names with one line each."""
    return [plain([what, ""], rows)]


def verification(checks: Sequence[Check]) -> list[RenderableType]:
    """What was promised beside what was found, and what each comparison rests on."""
    signs = {True: "ok", False: "DIFFERS", None: "--"}
    rows = [(check.name, check.promised, check.found, signs[check.ok]) for check in checks]
    notes = [f"{check.name}: {check.note}" for check in checks if check.note]
    return [plain(["", "promised", "found", ""], rows), *(Text(note, style="dim") for note in notes)]


def targets(found: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    """Each runtime: its name and what it is, then what can be done with it here."""
    lines: list[RenderableType] = []
    for target in found:
        verb = "predicts" if target["predicts_only"] else "times"
        facts = plain(("", ""), [], ())
        facts.show_header = False
        for name, text in (
            ("", target["summary"]),
            (verb, ", ".join(target["times"]) or "nothing"),
            ("exports", target["exports"] or "nothing"),
            ("here", target["unavailable"] or "ready"),
        ):
            facts.add_row(Text(f"  {name}"), Text(text))
        lines += [Text(target["name"], style="bold"), facts]
    return lines
