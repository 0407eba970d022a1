"""The bodies that requests have: these fields and no others."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from autoq.service.schemas import RoleName

Name = Annotated[str, Field(min_length=1, max_length=200)]


class Asked(BaseModel):
    """A request's body: these fields and no others."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class SpecBody(Asked):
    """A spec as JSON or as YAML text: one of the two."""

    spec: dict[str, Any] | None = None
    yaml: Annotated[str, Field(max_length=65_536)] | None = None


class SubmitBody(SpecBody):
    """A study to queue. Those of higher priority go first; only admins go above 0."""

    priority: Annotated[int, Field(strict=True, ge=-100, le=100)] = 0


class CheckBody(SpecBody):
    """A spec to check: by itself, or (`deep`) against the model and the target too."""

    deep: Annotated[bool, Field(strict=True)] = False


class ResumeBody(Asked):
    """Going on: to the end of the budget, or to so many trials in all."""

    trials: Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)] | None = None


MAX_STEPS = 10**6  # as `search.training` has it
Limit = Annotated[float, Field(strict=True)] | Annotated[str, Field(min_length=1, max_length=40)]


class RefineBody(Asked):
    """Limits to refine at, as in `pick`; up to `n` trials, to be best in `best`."""

    max: dict[Name, Limit] = Field(default_factory=dict, max_length=16)
    min: dict[Name, Limit] = Field(default_factory=dict, max_length=16)
    best: Name | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=64)] = 1


class RecoverBody(Asked):
    """How to train a trial: so many updates of each layer, each by so many windows of text, on at most so many tokens
    (null: all that are in no part of the study). `rate` multiplies the usual learning rates; `how`: all layers
    together by the model's answers, or one block of the model after the other by what it gives."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"steps": 200}, {"steps": 50, "how": "blocks"}]})

    steps: Annotated[int, Field(strict=True, ge=1, le=MAX_STEPS)]
    tokens: Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)] | None = None
    windows: Annotated[int, Field(strict=True, ge=1, le=MAX_STEPS)] = 1
    rate: Annotated[float, Field(strict=True, gt=0, lt=1000)] = 1.0
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0
    how: Literal["model", "blocks"] = "model"


class ExportBody(Asked):
    """What to export: a trial's number or a baseline's name, for a target (default: the study's)."""

    trial: Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)] | Name
    target: Name | None = None


class RemarkBody(Asked):
    """A note and tags; they replace what was there."""

    note: Annotated[str, Field(max_length=10_000)] = ""
    tags: Annotated[list[Annotated[str, Field(pattern=r"^[\w.:/ -]{1,40}$")]], Field(max_length=20)] = Field(
        default_factory=list
    )


class TokenBody(Asked):
    """A token to make: for whom, with what role, and how many days it lasts (null: until it is revoked)."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    user: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
    role: RoleName
    days: Annotated[float, Field(strict=True, gt=0, le=36500)] | None = None


class SessionBody(Asked):
    """A token to begin a session with."""

    token: Annotated[str, Field(min_length=1, max_length=200)]
