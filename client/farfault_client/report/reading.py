"""Reads a record back; `record_format` says what is in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from farfault_cli.errors import UsageError

from farfault_client.report.record_format import VERSION

LINES_MAX: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Sample:
    """What happened between two moments, in seconds since the record began.

    Attributes:
        since, until: the moments; equal in the first sample of a receiver.
        settled: pages that need no fetch any more at `until`.
        faults, bytes, blocked_s, latency: what was added; by lane, by vCPU, by histogram bucket.
        map: a digit a cell, see `record_format`; empty in most samples.
    """

    since: float
    until: float
    settled: int
    faults: int
    waiting: int
    bytes: Mapping[str, int]
    blocked_s: Mapping[str, float]
    latency: Mapping[int, int]
    map: str


@dataclass(frozen=True, slots=True)
class Event:
    """A line of the event log; `level` is ``info``, ``warning`` or ``error``."""

    at: float
    level: str
    text: str


@dataclass(slots=True)
class MoveRecord:
    """A record.

    Attributes:
        name: of its file.
        header: of the first receiver.
        receivers: how many wrote it, one after the other.
        summary: figures at the end; empty where the record breaks off.
    """

    name: str
    header: dict[str, Any]
    receivers: int = 0
    samples: list[Sample] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def end(self) -> float:
        """The last moment in it, in seconds."""
        return max([*(sample.until for sample in self.samples[-1:]), *(event.at for event in self.events[-1:]), 0.0])


def read_record(path: Path) -> MoveRecord:
    """Reads a file.

    Raises:
        UsageError: it cannot be read, or is not a record.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return parse_record(path.name, file)
    except OSError as error:
        raise UsageError(
            f"cannot read the record {path}: {error.strerror}", "name a file of `farfault receive --record`"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} is not a record of a move: {error}", "name a file of `farfault receive --record`"
        ) from error


def parse_record(name: str, lines: Iterable[str]) -> MoveRecord:
    """Parses lines. The last one may be cut: its writer may have been killed.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: they are not a record.
    """
    parser = _Parser(name)
    cut = ""
    for number, line in enumerate(lines):
        if number >= LINES_MAX:
            raise ValueError(f"more than {LINES_MAX} lines")
        if cut:
            raise ValueError(f"line {number}: {cut}")
        try:
            fields = json.loads(line)
        except ValueError as error:
            cut = str(error)
            continue
        parser.feed(fields)
    if parser.record is None:
        raise ValueError(cut or "it is empty")
    return parser.record


class _Parser:
    def __init__(self, name: str) -> None:
        self.record: MoveRecord | None = None
        self._name = name
        self._offset = 0.0
        self._before: dict[str, Any] = {}
        self._blocked_s: dict[str, float] = {}  # the VMM counts on, whoever receives

    def feed(self, fields: dict[str, Any]) -> None:
        kind = fields["type"]
        if kind == "header":
            self._header(fields)
            return
        if self.record is None:
            raise ValueError("it does not begin with a header")
        at = self._offset + float(fields["t"])
        if kind == "sample":
            self.record.samples.append(self._sample(fields, at))
        elif kind == "event":
            self.record.events.append(Event(at, str(fields["level"]), str(fields["text"])))
        elif kind == "footer":
            self.record.summary = dict(fields["summary"])
        else:
            raise ValueError(f"a line of the unknown type {kind!r}")

    def _header(self, fields: dict[str, Any]) -> None:
        if fields["version"] != VERSION:
            raise ValueError(f"it has version {fields['version']}, not {VERSION}")
        if self.record is None:
            self.record = MoveRecord(self._name, dict(fields))
        else:
            self._offset = max(self.record.end, float(fields["unix_s"]) - float(self.record.header["unix_s"]))
            self.record.events.append(Event(self._offset, "info", "another receiver took the move up"))
            self.record.summary = {}
        self.record.receivers += 1
        self._before = {}

    def _sample(self, fields: dict[str, Any], at: float) -> Sample:
        """Differences to the sample before; a receiver's first one counts from 0, except what the VMM counts."""
        before, self._before = self._before, {**fields, "at": at}
        blocked_s = {vcpu: float(total) for vcpu, total in fields["blocked_s"].items()}
        blocked_before, self._blocked_s = self._blocked_s, {**self._blocked_s, **blocked_s}
        bytes_before = before.get("bytes", {})
        return Sample(
            since=before.get("at", at),
            until=at,
            settled=int(fields["settled"]),
            faults=int(fields["faults"]) - int(before.get("faults", 0)),
            waiting=int(fields["waiting"]),
            bytes={lane: count - bytes_before.get(lane, 0) for lane, count in fields["bytes"].items()},
            blocked_s={vcpu: max(0.0, total - blocked_before.get(vcpu, 0.0)) for vcpu, total in blocked_s.items()},
            latency={int(bucket): int(count) for bucket, count in fields["latency"].items()},
            map=str(fields.get("map", "")),
        )
