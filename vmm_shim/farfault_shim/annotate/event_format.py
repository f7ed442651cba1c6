"""The ``format`` file of a tracepoint. No I/O.

Documentation/trace/events.rst, section 2.2: one ``field:`` line a member, with offset and size in bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, NamedTuple

FORMAT_BYTES_MAX: Final = 65536
_NAME: Final = re.compile(r"^name:\s*(\S+)\s*$", re.MULTILINE)
_ID: Final = re.compile(r"^ID:\s*(\d+)\s*$", re.MULTILINE)
_FIELD: Final = re.compile(
    r"^\s+field:(?P<declaration>[^;]+);\s*offset:(?P<offset>\d+);\s*size:(?P<size>\d+);", re.MULTILINE
)
_MEMBER: Final = re.compile(r"(\w+)(?:\[[^\]]*\])?\s*$")


class EventFormatError(Exception):
    """The text is not the format of the event that was expected."""


class EventField(NamedTuple):
    """A member of the record; offset and size in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class EventFormat:
    """A tracepoint's name, id and record.

    Attributes:
        name: without its system.
        event_id: attr.config of perf_event_open(2).
        fields: in the order of the file.
    """

    name: str
    event_id: int
    fields: tuple[EventField, ...]

    def field(self, name: str) -> EventField:
        """The member of that name. Raises EventFormatError where there is none."""
        for field in self.fields:
            if field.name == name:
                return field
        known = ", ".join(field.name for field in self.fields)
        raise EventFormatError(f"event {self.name} has no field {name}; it has {known}")

    @classmethod
    def parse(cls, text: str) -> EventFormat:
        """Reads a ``format`` file.

        Raises:
            EventFormatError: no name, no id, no fields, or too long.
        """
        if len(text) > FORMAT_BYTES_MAX:
            raise EventFormatError(f"an event format of {len(text)} bytes")
        name, number = _NAME.search(text), _ID.search(text)
        fields = tuple(_fields(text))
        if name is None or number is None or not fields:
            raise EventFormatError("no event format: name, ID or fields are missing")
        return cls(name[1], int(number[1]), fields)


def _fields(text: str) -> list[EventField]:
    found = []
    for match in _FIELD.finditer(text):
        member = _MEMBER.search(match["declaration"])
        if member is not None:
            found.append(EventField(member[1], int(match["offset"]), int(match["size"])))
    return found
