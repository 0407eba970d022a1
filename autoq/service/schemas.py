"""The answers' shapes, for OpenAPI: what `to_json()` gives, field by field. A test holds real answers to them.

Routes give back finished JSON; these models are never put between a record and its answer.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["measured", "predicted", "computed"]
Part = Literal["search", "report"]
StudyStateName = Literal["created", "queued", "running", "finished", "interrupted", "cancelled", "failed"]
TrialStateName = Literal["running", "complete", "stopped", "failed", "duplicate"]
RoleName = Literal["viewer", "submitter", "admin"]


class Shape(BaseModel):
    """An answer or a part of one: these fields, all of them, and no others."""

    model_config = ConfigDict(extra="forbid")


class Problem(Shape):
    """What is wrong, in one line, and which field of the request it is about, where it is about one."""

    message: str
    field: str | None = Field(default=None, json_schema_extra={"type": "string"})


class ErrorAnswer(Shape):
    """Every error."""

    error: Problem


class ObjectiveShape(Shape):
    """An objective of a study."""

    name: str
    unit: str
    direction: Literal["minimize", "maximize"]


class MeasurementShape(Shape):
    """A number with its error and where it came from."""

    value: float
    stderr: float | None
    unit: str
    kind: Kind
    part: Part
    n: int
    device: str
    detail: dict[str, Any]


class TrialErrorShape(Shape):
    """Why a trial failed."""

    type: str
    message: str
    traceback: str


class TrialShape(Shape):
    """One trial. `assignment` is null where it was not asked for."""

    study: str
    number: int
    state: TrialStateName
    origin: Literal["baseline", "seed", "sampler", "refine", "recover", "sequential"]
    baseline: str | None
    feasible: bool | None
    on_frontier: bool
    hash: str
    duplicate_of: int | None
    parent: int | None
    derivation: dict[str, Any] | None
    assignment: dict[str, str] | None
    measurements: dict[str, MeasurementShape]
    search: dict[str, MeasurementShape]
    violations: dict[str, float]
    error: TrialErrorShape | None
    seconds: float | None
    worker: str | None
    created_at: str
    finished_at: str | None


class FrontierTrialShape(TrialShape):
    """A trial of the frontier, and the numbers of those that it is better than in nothing, beyond noise."""

    no_better_than: list[int]


class OptimismShape(Shape):
    """How much more frontier points lose on the report part than on the search part, against baselines."""

    objective: str
    ratio: float
    stderr: float | None
    frontier: dict[str, float]
    baselines: dict[str, float]


class SamplerViewShape(Shape):
    """Predicted against measured quality, over finished proposals."""

    trials: int
    spearman: float | None
    median_ratio: float


class CountsShape(Shape):
    """How many trials are in each state."""

    running: int
    complete: int
    stopped: int
    failed: int
    duplicate: int


class SummaryShape(Shape):
    """One line of the list of studies."""

    id: int
    study: str
    model: str
    target: str
    state: StudyStateName
    message: str | None
    owner: str | None
    priority: int
    changes: int
    objectives: list[ObjectiveShape]
    trials: CountsShape
    frontier: int
    workers: int
    created_at: str
    queued_at: str | None
    started_at: str | None
    finished_at: str | None


class ListedStudyShape(SummaryShape):
    """A summary with what the study's own numbers say of it."""

    optimism: OptimismShape | None
    sampler_view: SamplerViewShape | None


class StudyListAnswer(Shape):
    """A page of studies; `next` is the cursor of the following one, null on the last."""

    studies: list[ListedStudyShape]
    next: str | None


class RemovalAnswer(Shape):
    """A study that was removed: the number and name it had, whose it was, how many trials went with it, by whom."""

    id: int
    study: str
    owner: str | None
    trials: int
    user: str | None
    removed_at: str


class StudyAnswer(Shape):
    """One study with its spec."""

    id: int
    study: str
    state: StudyStateName
    message: str | None
    owner: str | None
    priority: int
    changes: int
    objectives: list[ObjectiveShape]
    spec: dict[str, Any]
    created_at: str
    queued_at: str | None
    started_at: str | None
    finished_at: str | None


class StudyStandingAnswer(StudyAnswer):
    """One study with its counts."""

    trials: CountsShape
    frontier: int


class TrialsAnswer(Shape):
    """A page of trials; `next` is the number to go on after, null on the last page."""

    study: str
    objectives: list[ObjectiveShape]
    trials: list[TrialShape]
    next: int | None


class BaselinesAnswer(Shape):
    """The uniform baselines."""

    study: str
    objectives: list[ObjectiveShape]
    trials: list[TrialShape]


class FrontierAnswer(Shape):
    """The frontier."""

    study: str
    objectives: list[ObjectiveShape]
    trials: list[FrontierTrialShape]
    optimism: OptimismShape | None
    sampler_view: SamplerViewShape | None


class SensitivityAnswer(Shape):
    """Predicted loss of every layer under every scheme."""

    study: str
    kind: Literal["predicted"]
    unit: str
    layers: dict[str, dict[str, float]]


class LayersAnswer(Shape):
    """What the study knows of the model's layers: shapes, kinds, parameters."""

    study: str
    layers: dict[str, dict[str, Any]]


class DiffAnswer(Shape):
    """Layers that differ between two trials, and what it costs."""

    study: str
    a: int
    b: int
    layers: dict[str, dict[str, str | int | None]]
    measurements: dict[str, dict[str, MeasurementShape]]


class ValuesAnswer(Shape):
    """One number per token behind a measurement, window by window; null where a token does not count."""

    study: str
    number: int
    objective: str
    part: Part
    values: list[list[float | None]]


class PredictionShape(Shape):
    """A prediction and its 95 % interval."""

    value: float
    low: float
    high: float
    kind: Kind


class OfferAnswer(Shape):
    """What the study's model would have within limits; `trial` has measured this very assignment, null: none has."""

    study: str
    predicted: dict[str, PredictionShape]
    assignment: dict[str, str]
    trial: int | None


class CheckAnswer(Shape):
    """Whether a spec is valid, and how far that was looked at: its own text, or against model and target too."""

    ok: bool
    message: str | None
    field: str | None
    checked: Literal["spec", "model"]
    spec: dict[str, Any] | None
    facts: dict[str, Any] | None


class RemarkShape(Shape):
    """What is noted on a trial."""

    trial: int
    note: str
    tags: list[str]
    user: str | None
    changed_at: str | None


class RemarksAnswer(Shape):
    """The remarks on a study's trials."""

    study: str
    remarks: list[RemarkShape]


class WorkerShape(Shape):
    """What evaluates, as its controller last saw it."""

    id: str
    node: str
    device: str
    state: str
    study_id: int | None
    study: str | None
    trial: int | None
    memory_bytes: int | None
    started_at: str | None
    seen_at: str | None


class WorkersAnswer(Shape):
    """The workers."""

    workers: list[WorkerShape]


class ExportShape(Shape):
    """One export; `result` holds the manifest and what verification found once it is finished."""

    id: int
    study_id: int
    study: str
    trial: int
    target: str
    user: str | None
    state: str
    message: str | None
    progress: dict[str, Any] | None
    result: dict[str, Any] | None
    created_at: str
    started_at: str | None
    finished_at: str | None


class ExportsAnswer(Shape):
    """Exports, oldest first."""

    exports: list[ExportShape]


class TokenShape(Shape):
    """A token without its secret."""

    id: int
    name: str
    user: str
    role: RoleName
    valid: bool
    created_at: str
    expires_at: str | None
    revoked_at: str | None
    used_at: str | None


class TokensAnswer(Shape):
    """All tokens, oldest first."""

    tokens: list[TokenShape]


class NewTokenAnswer(TokenShape):
    """A new token. `token` is shown this once."""

    token: str


class SessionAnswer(Shape):
    """Who asks; `open` says that nobody has to say so here."""

    user: str | None
    role: RoleName | None
    open: bool


class ChoiceShape(Shape):
    """A plugin and its line."""

    name: str
    summary: str


class TargetShape(ChoiceShape):
    """A target: what it times, what it exports, and why it cannot measure here, if it cannot."""

    times: list[str]
    predicts_only: bool
    exports: str | None
    unavailable: str | None


class MethodsAnswer(Shape):
    """The methods."""

    methods: list[ChoiceShape]


class ObjectivesAnswer(Shape):
    """The objectives."""

    objectives: list[ChoiceShape]


class SamplersAnswer(Shape):
    """The samplers."""

    samplers: list[ChoiceShape]


class TargetsAnswer(Shape):
    """The targets."""

    targets: list[TargetShape]


class HealthAnswer(Shape):
    """The process is alive."""

    status: Literal["ok"]


class ReadyAnswer(Shape):
    """Whether the server can do its work, and what it lacks."""

    ready: bool
    database: bool
    schema_current: bool
    scheduler: bool


# Figures


class TableShape(Shape):
    """The numbers of a picture; `total` rows, of which the first are here."""

    headers: list[str]
    units: list[str]
    rows: list[list[str | float | bool | None]]
    total: int


class FigureAnswer(Shape):
    """A picture in Plotly's JSON schema, `{"data", "layout"}`, its table, and how to read it."""

    plotly: dict[str, Any]
    table: TableShape
    title: str
    note: str


class PointObjectiveShape(Shape):
    """An objective; what is measured beside the study's own has no direction."""

    name: str
    unit: str
    direction: Literal["minimize", "maximize", ""]


class PointsAnswer(Shape):
    """Trials by columns: one list per fact, and per objective one list per fact of its measurement."""

    study: str
    state: StudyStateName
    changes: int
    objectives: list[PointObjectiveShape]
    columns: dict[str, list[Any]]
    measured: dict[str, dict[str, list[Any]]]


class OverviewAnswer(Shape):
    """A study in one sentence about trial `trial`, and its hypervolume as an SVG path in a box of 128 by 40."""

    study: str
    changes: int
    budget: int | None
    workers: int
    headline: str | None
    trial: int | None
    spark: str
