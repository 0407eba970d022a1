"""AutoQ's own: an exported folder, or an assignment as `autoq pick --json` or `--yaml` prints it.

A folder holds `autoq.json`, the manifest, beside `assignment.json`, layer -> scheme, whose hash the
manifest knows. What else was exported is not looked at: the weights are made anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from autoq.assignment import Assignment
from autoq.errors import BadInput
from autoq.recipes._files import member
from autoq.scheme import Scheme
from autoq.shipping import manifest as exported

MANIFEST = exported.MANIFEST


def is_manifest(tree: Mapping[str, object]) -> bool:
    """Whether plain data is what an export's manifest holds."""
    return {"format", "files", "target"} <= set(tree)


def folder_schemes(folder: Path) -> Mapping[str, Sequence[Scheme]]:
    """Layer name -> its one scheme, as an exported folder says. Raises `BadInput` and `ExportBroken`."""
    if member(folder, exported.MANIFEST) is None or member(folder, exported.ASSIGNMENT) is None:
        raise BadInput(f"it must hold {exported.MANIFEST} and {exported.ASSIGNMENT}: the export is not whole")
    return _alone(exported.read_assignment(folder, exported.read(folder)))


def tree_schemes(tree: object, where: str) -> Mapping[str, Sequence[Scheme]]:
    """Layer name -> its one scheme, from plain data. Raises `BadInput` naming the entry."""
    if not isinstance(tree, Mapping) or not tree:
        raise BadInput(f"{where} must map layer names to schemes")
    return _alone(Assignment.from_dict(tree))


def _alone(assignment: Assignment) -> Mapping[str, Sequence[Scheme]]:
    if assignment.caches:
        name, scheme = next(iter(assignment.caches.items()))
        raise BadInput(f"{name} as {scheme}: recipes are of layers alone; take KV caches out")
    return {name: [scheme] for name, scheme in assignment.items()}
