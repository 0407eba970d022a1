"""A study as one HTML file: the dashboard's figures with their tables, how it was measured, and how to do it again.

It asks the network for nothing: Plotly's JavaScript is taken from the installed package and stands in the file. All
names are escaped, and data cannot end the script that it stands in.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import autoq
from autoq.cache import write_out
from autoq.display import numbers
from autoq.display.hindsight import hindsight
from autoq.errors import AutoQError

from . import drawing, palette
from .columns import Trials
from .picks import picks
from .study_view import View

if TYPE_CHECKING:
    from autoq.store import Store, TrialRecord

    from .figures import Figure

MOST_ROWS = 300  # of a table
INSTALL = "pip install 'autoq[serve]'"
_Wanted = tuple[str, str, dict[str, object]]  # a heading of its own, a figure, options
_PICK_WORDS = {"smallest": "the smallest", "knee": "the knee", "best": "the best"}


def html(store: Store, study_id: int) -> str:
    """The report of a study. Raises `AutoQError` where no trial is complete, or Plotly or Jinja2 is not installed."""
    if importlib.util.find_spec("jinja2") is None:
        raise AutoQError(f"jinja2 is not installed: {INSTALL}")
    script = plotly_script()
    view = View(store, study_id).refresh()
    study = view.study
    if not view.trials.states("complete").any():
        raise AutoQError(f"study {study.name!r} has no complete trial: there is nothing to report yet")
    import jinja2

    template = resources.files(__package__).joinpath("templates", "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_readable
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False, "sort_keys": False}
    return environment.from_string(template).render(
        study=study,
        model=study.spec["model"]["id"],
        target=study.spec["target"]["name"],
        headline=headline(view),
        facts=_facts(view),
        chapters=_chapters(view),
        measured=_measured(view),
        remarks=hindsight(store, study).lines(),
        spec=_yaml(study.spec),
        commands=_commands(view),
        version=autoq.__version__,
        templates={theme: palette.template(theme) for theme in palette.THEMES},
        plotly=script,
        most_rows=MOST_ROWS,
    )


def plotly_script() -> str:
    """Plotly's JavaScript from the installed package, fit to stand in a page. The package is not imported."""
    found = importlib.util.find_spec("plotly")
    path = (
        None if found is None or found.origin is None else Path(found.origin).parent / "package_data" / "plotly.min.js"
    )
    if path is None or not path.is_file():
        raise AutoQError(f"plotly is not installed: {INSTALL}")
    # Nothing in a script may look like its end; in JavaScript's texts the two are the same.
    return path.read_text(encoding="utf-8").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def headline(view: View) -> str:
    """What came of the study, in one sentence."""
    savings = view.figure("savings")
    if savings.table.rows:
        return savings.note.partition(". Measured")[0] + "."
    trials, objectives = view.trials, view.study.objectives
    count, front = int(trials.states("complete").sum()), int(trials.on_frontier.sum())
    said = f"{count} complete {'trial' if count == 1 else 'trials'}, {front} of them on the frontier"
    best = picks(view).get("best")
    if best is None:
        return f"{said}: none keeps the constraints."
    record = view.records([best])[0].best_measurements()
    values = ", ".join(f"{o.name} {numbers.quantity(record[o.name].value, o.unit)}" for o in objectives)
    return f"{said}; the best has {values}."


_WORD, _PIECE = 120, 40


def _readable(value: object) -> object:
    """Text that anybody may have written, as in `static/dom.js`: where a long word may break is said, for to find that
    out takes a browser minutes, and marks that turn the order of letters around are shown."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    from markupsafe import Markup

    text = drawing.visible(value)
    if len(text) <= _WORD:
        return text
    parts = re.split(rf"(\S{{{_WORD + 1},}})", text)
    return Markup("").join(
        Markup("<wbr>").join(part[at : at + _PIECE] for at in range(0, len(part), _PIECE)) if i % 2 else part
        for i, part in enumerate(parts)
    )


def _facts(view: View) -> list[tuple[str, str]]:
    study, trials = view.study, view.trials
    counts = {state: int(trials.states(state).sum()) for state in ("complete", "stopped", "failed", "duplicate")}
    found = [
        ("model", str(study.spec["model"]["id"])),
        ("target", str(study.spec["target"]["name"])),
        ("state", study.state),
    ]
    if study.message:
        found.append(("message", study.message))
    found.append(("trials", ", ".join(f"{count} {state}" for state, count in counts.items() if count)))
    found.append(("objectives", ", ".join(f"{o.name} ({o.unit}, {o.direction})" for o in study.objectives)))
    if study.started_at:
        found.append(("begun", study.started_at.strftime("%Y-%m-%d %H:%M UTC")))
    if study.finished_at:
        found.append(("ended", study.finished_at.strftime("%Y-%m-%d %H:%M UTC")))
    return found


def _chapters(view: View) -> list[dict[str, Any]]:
    """Headings with their figures; figures that have nothing to show are left out."""
    by_trial: dict[int, list[str]] = {}
    for name, number in picks(view).items():
        by_trial.setdefault(number, []).append(_PICK_WORDS[name])
    maps: list[_Wanted] = [
        (f"{' and '.join(words)}: {view.trials.label(number)}", "layer_map", {"trial": number})
        for number, words in by_trial.items()
    ]
    plan: list[tuple[str, list[_Wanted]]] = [
        ("Frontier", [("", "frontier", {}), ("", "savings", {}), ("", "parallel", {})]),
        ("Layers", [*maps, ("", "which_layers_pay", {})]),
        ("Sensitivity", [("", "sensitivity_map", {})]),
        ("How the search went", [("", "hypervolume", {}), ("", "predicted_measured", {}), ("", "progress", {})]),
    ]
    chapters = []
    for heading, wanted in plan:
        shown = [_shown(view.figure(name, **options), title, name) for title, name, options in wanted]
        kept = [each for each in shown if each["rows"]]
        if kept:
            chapters.append({"heading": heading, "figures": kept})
    return chapters


def _shown(figure: Figure, title: str, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "title": title[:1].upper() + title[1:] if title else figure.title,
        "note": figure.note,
        "plotly": figure.plotly,
        "headers": figure.table.headers,
        "numeric": [bool(column.unit) for column in figure.table.columns],
        "rows": figure.table.text(MOST_ROWS),
        "total": len(figure.table.rows),
        "switchable": name == "frontier",
    }


def _measured(view: View) -> list[tuple[str, str]]:
    """Where the numbers come from: parts and tokens of the data, devices, runtimes, kinds of each objective."""
    spec, trials = view.study.spec, view.trials
    data: Mapping[str, Any] = spec.get("data", {})
    tokens = {part: data.get(f"{part}_tokens") for part in ("calibration", "search", "report")}
    found = []
    if data.get("source"):
        parts = ", ".join(f"{count:,} {part} tokens" for part, count in tokens.items() if count)
        found.append(("data", f"{data['source']}: {parts}; the three parts are disjoint"))
    records = view.records(list(dict.fromkeys([*picks(view).values(), *list(trials.baselines)[:4]])))
    devices, runtimes = _provenance(records)
    found += [("devices", "; ".join(devices))] if devices else []
    found += [("runtimes", "; ".join(runtimes))] if runtimes else []
    for name, unit in trials.units.items():
        found.append((name, f"in {unit}: {_kinds(trials, name)}"))
    found.append(("AutoQ", autoq.__version__))
    return found


def _provenance(records: Sequence[TrialRecord]) -> tuple[list[str], list[str]]:
    measurements = [m for record in records for m in record.measurements.values()]
    devices = sorted({m.device for m in measurements if m.device})
    runtimes = sorted({str(m.detail["runtime"]) for m in measurements if m.detail.get("runtime")})
    return devices, runtimes


def _kinds(trials: Trials, name: str) -> str:
    from .columns import KINDS, PARTS

    said = []
    for part in PARTS:
        kind = trials.measured(name, part).kind
        for index, word in enumerate(KINDS):
            count = int((kind == index).sum())
            if count:
                where = "" if word == "computed" else f" on the {part} part"
                said.append(f"{word}{where} for {count} {'trial' if count == 1 else 'trials'}")
    return ", ".join(said)


def _yaml(spec: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(_plain(spec), sort_keys=False, allow_unicode=True, width=100)


def _plain(value: Any) -> Any:
    """Without what is not set: a spec has a default there."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None and inner not in ({}, [])}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _commands(view: View) -> list[tuple[str, str]]:
    import shlex

    name = shlex.quote(view.study.name)
    found = [("the same search again, from the spec above saved as spec.yaml", "autoq search spec.yaml")]
    number = picks(view).get("knee", picks(view).get("best"))
    found.append(("the frontier, from the database", f"autoq frontier {name}"))
    if number is not None:
        found.append(("this study's pick as a checkpoint", f"autoq export {name} {number} --out model"))
    return found


def write(store: Store, study_id: int, path: Path) -> int:
    """Write the report; its size in bytes. Raises `AutoQError` where the file cannot be written."""
    text = html(store, study_id).encode()
    write_out(path, text)
    return len(text)
