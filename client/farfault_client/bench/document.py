"""Sections of a Markdown document that commands write, between text that people write."""

from __future__ import annotations

from pathlib import Path


def replace_section(path: Path, name: str, text: str) -> None:
    """Puts `text` between the section's two comment lines; at the end of the document where there are none yet."""
    begin, end = f"<!-- {name}: written by a command -->", f"<!-- end of {name} -->"
    section = f"{begin}\n\n{text.strip()}\n\n{end}"
    document = path.read_text() if path.exists() else ""
    before, found, rest = document.partition(begin)
    if found:
        after = rest.partition(end)[2]
        path.write_text(f"{before}{section}{after}")
    else:
        path.write_text(f"{document.rstrip()}\n\n{section}\n".lstrip())


def markdown_table(headings: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [headings, ["---", *(["---:"] * (len(headings) - 1))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine_text(machine: dict[str, str], command: str) -> str:
    """The command and where it ran, as a list."""
    lines = [f"- command: `{command}`", *(f"- {name}: {value}" for name, value in machine.items())]
    return "\n".join(lines)
