"""Which fault source a destination VM gets."""

from __future__ import annotations

from typing import Final

import click

from farfault_client.demo.vms import VmmKind

FAULT_SOURCES: Final = ("auto", "stock-nowait", "blocking")


def choose_fault_source(kind: VmmKind, wish: str) -> str:
    """What the destination's vCPUs do at a missing page.

    Args:
        wish: one of `FAULT_SOURCES`; auto: NOWAIT exits where this host can annotate them.
    """
    if kind is VmmKind.SIMULATED:
        return "simulated"
    if wish != "auto":
        return wish
    from farfault_shim.annotate.discover import discover

    found = discover().values()
    if any(discovery.annotator is not None for discovery in found):
        return "stock-nowait"
    problem = next(iter(found)).problem
    click.echo(f"NOWAIT exits cannot be annotated here ({problem}); blocking userfaultfd instead", err=True)
    return "blocking"
