"""Metering a transformers model on its workload: joules per token while it decodes, or reads its input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from autoq.energy import work
from autoq.energy.meters import Meter, joules_per_token
from autoq.layer import ModelInfo
from autoq.measurement import Measurement
from autoq.spec import TargetSpec
from autoq.targets._torch_cpu_timing import STEPS, Session

OBJECTIVE = "energy_joule_per_token"


@torch.no_grad()
def metered(
    session: Session,
    info: ModelInfo,
    workload: TargetSpec,
    meter: Meter,
    device: str,
    detail: Mapping[str, Any],
    finish: Callable[[], None] = lambda: None,
) -> Measurement:
    """Joules per token of what `session` runs now, by `meter`; kernels are the caller's to install.

    A decoder's steps are metered, the prompt before them is not; of a model that decodes nothing, whole
    inputs. `finish` waits for what was only queued. Raises `OSError` when the meter fails.
    """

    def nothing() -> dict[str, Any]:
        return {}

    def whole(_: Any) -> dict[str, Any]:
        return session.prefill()

    decodes = work.DECODE in session.phases
    room = STEPS if info.max_positions is None else info.max_positions - workload.prompt_tokens
    # Longer than the timing's runs where a slow counter asks for it, up to twice the prompt.
    most = max(STEPS, min(room, workload.prompt_tokens)) if decodes and info.task == "causal" else STEPS
    found = joules_per_token(
        meter,
        prepare=session.prefill if decodes else nothing,
        step=session.step if decodes else whole,
        steps=STEPS if decodes else 1,
        most=most,
        tokens=work.tokens(info, workload),
        finish=finish,
    )
    return Measurement(
        OBJECTIVE, found.joules, "J", "measured", "report", found.stderr, found.n, device, {**detail, **found.detail}
    )
