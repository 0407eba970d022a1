"""A server's answers as the records that a database gives, so that commands print the same from both.

    with Server.open("https://autoq.internal") as server:
        for summary, _ in server.studies(): ...

The token comes from AUTOQ_TOKEN, or from the file that AUTOQ_TOKEN_FILE names, and goes to that server only: redirects
are not followed, and it is not sent unencrypted to another machine, a proxy that the environment names included. What
a server answers is data to be shown: what would steer a terminal is spelled out. What may be sent twice without harm
is sent again when a connection breaks; a submission carries a key under which the server makes one study of any number
of them.
"""

from __future__ import annotations

import ipaddress
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlsplit

from autoq import documents
from autoq.display.hindsight import Hindsight
from autoq.errors import AutoQError, BadInput, NotFound, Unavailable
from autoq.reading import Frontier, Limits
from autoq.store import StudyRecord, StudySummary, TrialRecord, TrialState

if TYPE_CHECKING:
    import httpx

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_STEERING = re.compile(rb"\\u00|[\x7f]|\xc2[\x80-\x9f]")  # how they may stand in JSON
SECONDS = 60.0
ATTEMPTS = 4
PAGE = 500
S = TypeVar("S", bound="Server")


def read_token() -> str | None:
    """The token of AUTOQ_TOKEN or of the file AUTOQ_TOKEN_FILE; None where neither is set. Raises `BadInput`."""
    if token := os.environ.get("AUTOQ_TOKEN"):
        return token.strip()
    if not (name := os.environ.get("AUTOQ_TOKEN_FILE")):
        return None
    path = Path(name)
    try:
        if path.stat().st_mode & 0o077:
            raise BadInput(f"AUTOQ_TOKEN_FILE: others can read {name!r}; run: chmod 600 {name}")
        return path.read_text(encoding="utf-8").strip()
    except OSError as problem:
        raise BadInput(f"AUTOQ_TOKEN_FILE: {name!r} cannot be read: {problem.strerror}") from None


def check_url(url: str, token: str | None) -> str:
    """The server's base URL without a slash at its end. Raises `BadInput` for what is none, for a user or password in
    it, and for a token that would travel unencrypted."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput(f"--server {url[:200]!r} must be a URL such as https://autoq.internal or http://localhost:8000")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise BadInput("--server takes a plain URL; the token comes from AUTOQ_TOKEN or AUTOQ_TOKEN_FILE")
    if token and parts.scheme == "http" and not _loopback(parts.hostname):
        raise BadInput(f"--server {url[:200]!r} would send the token unencrypted; use https")
    return url.rstrip("/")


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Server:
    """A running server, asked over HTTP. Use as a context manager, or close it."""

    def __init__(self, url: str, client: httpx.Client) -> None:
        self.url, self._client = url, client

    @classmethod
    def open(cls: type[S], url: str) -> S:
        """The server at `url`; nothing is asked yet. Raises `BadInput`, and `AutoQError` without httpx."""
        try:
            import httpx
        except ModuleNotFoundError:
            raise AutoQError("--server needs httpx: pip install 'autoq[client]'") from None
        token = read_token()
        base = check_url(url, token)
        headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        # This machine is asked itself, not through a proxy that HTTP_PROXY names: that one would read the token.
        host = urlsplit(base).hostname or ""
        direct = {f"all://{f'[{host}]' if ':' in host else host}": None} if _loopback(host) else {}
        options: dict[str, Any] = {"timeout": SECONDS, "follow_redirects": False, "mounts": direct}
        return cls(base, httpx.Client(base_url=base, headers=headers, **options))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self: S) -> S:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Reading

    def studies(self) -> list[tuple[StudySummary, Hindsight]]:
        """All studies that this user may see, oldest first."""
        found: list[tuple[StudySummary, Hindsight]] = []
        cursor = None
        while True:
            page = self._get("/studies", limit=PAGE, sort="created", cursor=cursor)
            found += [(StudySummary.from_json(entry), Hindsight.from_json(entry)) for entry in page["studies"]]
            former, cursor = cursor, page["next"]
            if cursor is None or cursor == former:
                return found

    def study(self, name: str) -> StudyRecord:
        """One study. Raises `NotFound`."""
        return StudyRecord.from_json(self._get(f"/studies/{_part(name)}"))

    def summary(self, name: str) -> StudySummary:
        """How one study stands."""
        told = self._get(f"/studies/{_part(name)}")
        named = {"model": told["spec"]["model"]["id"], "target": told["spec"]["target"]["name"]}
        return StudySummary.from_json(told | named)

    def trials(
        self, study: str, states: Sequence[TrialState] | None, limit: int | None, with_assignments: bool
    ) -> list[TrialRecord]:
        """The trials of a study in the order of their numbers, in one of `states`, at most `limit`."""
        found: list[TrialRecord] = []
        after = -1
        while limit is None or len(found) < limit:
            wanted = PAGE if limit is None else min(PAGE, limit - len(found))
            page = self._get(
                f"/studies/{_part(study)}/trials",
                after=after, limit=wanted, assignments=with_assignments, state=list(states or ()),
            )  # fmt: skip
            found += [TrialRecord.from_json(entry) for entry in page["trials"]]
            if page["next"] is None or page["next"] <= after:
                break
            after = page["next"]
        return found

    def frontier(self, study: str, maximum: Limits, minimum: Limits, with_assignments: bool) -> Frontier:
        """The frontier within limits."""
        where = f"/studies/{_part(study)}"
        found = self._get(f"{where}/frontier", assignments=with_assignments, **_limits(maximum, minimum))
        uniform = [TrialRecord.from_json(entry) for entry in self._get(f"{where}/baselines")["trials"]]
        record = self.study(study)
        points = [TrialRecord.from_json(entry) for entry in found["trials"]]
        ties = {entry["number"]: entry["no_better_than"] for entry in found["trials"]}
        _, uniform = documents.within(record, points, uniform, maximum, minimum)
        return Frontier(record, points, uniform, ties, Hindsight.from_json(found))

    def pick(self, study: str, maximum: Limits, minimum: Limits, best: str | None) -> dict[str, Any]:
        """The frontier's best trial within limits, with its assignment and `no_better_than`, as JSON."""
        return self._get(f"/studies/{_part(study)}/pick", best=best, **_limits(maximum, minimum))

    def diff(self, study: str, a: str, b: str) -> dict[str, Any]:
        """What differs between two trials, each a number or a baseline's name, as JSON."""
        return self._get(f"/studies/{_part(study)}/diff", a=a, b=b)

    def report(self, study: str) -> bytes:
        """The study as one HTML file."""
        return b"".join(self._stream(f"/studies/{_part(study)}/report"))

    def tokens(self) -> list[dict[str, Any]]:
        """All tokens as JSON, oldest first; for admins."""
        found: list[dict[str, Any]] = self._get("/tokens")["tokens"]
        return found

    def offered(self, what: str) -> list[dict[str, Any]]:
        """What there is to choose from there: of `methods`, `targets`, `objectives` or `samplers`, as JSON."""
        found: list[dict[str, Any]] = self._get(f"/{what}")[what]
        return found

    def has_sensitivities(self, study: str) -> bool:
        """Whether there is something to predict from."""
        try:
            self._get(f"/studies/{_part(study)}/sensitivity")
        except NotFound:
            return False
        return True

    def offer(self, study: str, maximum: Limits, minimum: Limits, best: str | None) -> dict[str, Any]:
        """What the study's model would have within limits, as `search.offers.offer_json` says it; not measured."""
        return self._get(f"/studies/{_part(study)}/offer", best=best, **_limits(maximum, minimum))

    # Writing

    def submit(self, spec: Mapping[str, Any], priority: int = 0, key: str | None = None) -> StudyRecord:
        """Queue a study; sent again when the connection breaks, or later with the same key, it is still one study.

        Raises `Unavailable` where no answer came, and it may have been queued or not.
        """
        body = {"spec": dict(spec), "priority": priority}
        return StudyRecord.from_json(self._send("POST", "/studies", body, {"Idempotency-Key": key or uuid.uuid4().hex}))

    def cancel(self, study: str) -> StudyRecord:
        """End a study after the trials that are out."""
        return StudyRecord.from_json(self._send("POST", f"/studies/{_part(study)}/cancel", None))

    def remove(self, study: str) -> dict[str, Any]:
        """Remove a study for good; what was removed, as JSON."""
        return self._send("DELETE", f"/studies/{_part(study)}", None)

    def resume(self, study: str, trials: int | None = None) -> StudyRecord:
        """Queue a study that has ended again, to the end of its budget or to more trials."""
        body = None if trials is None else {"trials": trials}
        return StudyRecord.from_json(self._send("POST", f"/studies/{_part(study)}/resume", body))

    def refine(self, study: str, maximum: Limits, minimum: Limits, best: str | None, count: int) -> StudyRecord:
        """Queue up to `count` trials of what the study's model offers within limits."""
        body = {"max": dict(maximum), "min": dict(minimum), "best": best, "n": count}
        return StudyRecord.from_json(self._send("POST", f"/studies/{_part(study)}/refine", body))

    def export(self, study: str, trial: str, target: str | None) -> dict[str, Any]:
        """Queue an export of a trial, by its number or its baseline's name; the export as it stands."""
        wanted: dict[str, Any] = {"trial": int(trial) if trial.isascii() and trial.isdecimal() else trial}
        return self._send("POST", f"/studies/{_part(study)}/exports", wanted | ({"target": target} if target else {}))

    def exported(self, export: int) -> dict[str, Any]:
        """How an export stands."""
        return self._get(f"/exports/{export}")

    def download(self, export: int) -> Iterator[bytes]:
        """The archive of a finished export, piece by piece."""
        return self._stream(f"/exports/{export}/download")

    def create_token(self, name: str, user: str, role: str, days: float | None) -> dict[str, Any]:
        """Make a token; its record with the secret under `token`. Not sent again: the answer is its only copy."""
        return self._send("POST", "/tokens", {"name": name, "user": user, "role": role, "days": days})

    def revoke_token(self, token: int) -> dict[str, Any]:
        """Let a token open nothing from now on; its record."""
        return self._send("DELETE", f"/tokens/{token}", None, {})

    # HTTP

    def _stream(self, path: str) -> Iterator[bytes]:
        """What is no JSON, piece by piece."""
        import httpx

        try:
            with self._client.stream("GET", f"/api/v1{path}") as answer:
                if answer.status_code != 200:
                    answer.read()
                    self._document(answer)
                yield from answer.iter_bytes()
        except httpx.HTTPError as problem:
            raise self._silent(problem) from None

    def _get(self, path: str, **query: Any) -> dict[str, Any]:
        said = {key: value for key, value in query.items() if value is not None and value != []}
        return self._send("GET", path, None, query=said)

    def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        import httpx

        again = method == "GET" or headers is not None  # sent twice it does what it does once
        for attempt in range(ATTEMPTS):
            last = attempt == ATTEMPTS - 1 or not again
            try:
                answer = self._client.request(
                    method, f"/api/v1{path}", json=body, headers=dict(headers or {}), params=dict(query or {})
                )
            except httpx.HTTPError as problem:
                if last:
                    raise self._silent(problem) from None
                time.sleep(0.5 * 2**attempt)
                continue
            if answer.status_code in (429, 503) and not last:
                time.sleep(_patience(answer.headers.get("Retry-After"), 0.5 * 2**attempt))
                continue
            return self._document(answer)
        raise AssertionError("the last attempt answers or raises")

    def _silent(self, problem: Exception) -> Unavailable:
        reason = next(iter(str(problem).splitlines()), "") or type(problem).__name__
        return Unavailable(f"the server at {self.url} does not answer: {reason}")

    def _document(self, answer: httpx.Response) -> dict[str, Any]:
        """The answer's document. Raises the error that it is."""
        try:
            document = _printable(answer.json()) if _STEERING.search(answer.content) else answer.json()
        except (ValueError, RecursionError):
            document = None
        if answer.is_success and isinstance(document, dict):
            return document
        if answer.is_success or answer.is_redirect or not isinstance(document, dict) or "error" not in document:
            raise AutoQError(f"{self.url} does not answer as AutoQ does (HTTP {answer.status_code}); is the URL right?")
        said = str(document["error"].get("message", answer.reason_phrase))
        if answer.status_code == 401:
            raise BadInput(f"{said}; give a token in AUTOQ_TOKEN, or in the file that AUTOQ_TOKEN_FILE names")
        if answer.status_code == 404:
            raise NotFound(said)
        raise (BadInput if answer.status_code < 500 and answer.status_code != 429 else AutoQError)(said)


def _patience(said: str | None, otherwise: float) -> float:
    """Seconds to wait: what the server says, if that is a number, and never long."""
    try:
        seconds = float(said or otherwise)
    except ValueError:  # a date, which HTTP allows too
        seconds = otherwise
    return min(10.0, seconds) if seconds > 0 else otherwise


def _printable(tree: Any) -> Any:
    """The same document with control characters spelled out, but for line breaks and tabs."""
    if isinstance(tree, str):
        return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", tree)
    if isinstance(tree, dict):
        return {_printable(key): _printable(value) for key, value in tree.items()}
    return [_printable(value) for value in tree] if isinstance(tree, list) else tree


def _limits(maximum: Limits, minimum: Limits) -> dict[str, list[str]]:
    given = (("max", maximum), ("min", minimum))
    return {name: [f"{objective}={value}" for objective, value in limits.items()] for name, limits in given}


def _part(name: str) -> str:
    """A name as one part of a path."""
    text = quote(name, safe="")
    if text in ("", ".", ".."):
        raise NotFound(f"no study {name!r}")
    return text
