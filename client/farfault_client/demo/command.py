"""The command ``farfault demo``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
from farfault_cli.errors import FarfaultError, UsageError, VerificationError
from farfault_cli.sizes import SIZE

from farfault_client.demo.fault_source import FAULT_SOURCES, choose_fault_source
from farfault_client.demo.processes import Processes, end_on_sigterm
from farfault_client.demo.scene import Scene, SceneConfig, scene_folder
from farfault_client.demo.vms import VmmKind
from farfault_client.migrate.follow import progress_bar
from farfault_client.options import FILE
from farfault_client.receive.summary import summary_of
from farfault_client.report.command import write_report

RAM_DEFAULT = {VmmKind.QEMU: 512 << 20, VmmKind.REFERENCE: 256 << 20, VmmKind.SIMULATED: 32 << 20}
GUEST_RAM_MIN_BYTES = 24 << 20
"""The guest's data begins at 16 MiB."""


@click.command()
@click.option(
    "--vmm", type=click.Choice([kind.value for kind in VmmKind]), help="Default: the best that this machine has."
)
@click.option("--ram", type=SIZE, help="RAM of the guest. Default: 512MiB for QEMU, less for others.")
@click.option("--vcpus", type=click.IntRange(1, 64), default=2, show_default=True)
@click.option(
    "--fault-source",
    type=click.Choice(FAULT_SOURCES),
    default="auto",
    show_default=True,
    help="How vCPUs miss pages; auto: NOWAIT exits where this host can annotate them.",
)
@click.option("--report", type=FILE, metavar="FILE", help="Write the page that `farfault report` makes of the move.")
@click.option("--keep", is_flag=True, help="Keep the folder with logs and records, and say where it is.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end, nothing else.")
def demo(
    vmm: str | None,
    ram: int | None,
    vcpus: int,
    fault_source: str,
    report: Path | None,
    keep: bool,
    as_json: bool,
) -> None:
    """Move a real VM by post-copy on this machine, and check every byte of it.

    A guest fills its RAM and then verifies and changes every page for ever. It is moved while it runs: its vCPUs
    start on the destination at once, and each page that they miss is fetched through the page server. At the
    end the guest's own account and a check of all its RAM from outside must agree.

    \b
      farfault demo
      farfault demo --vmm qemu --ram 2GiB --vcpus 4 --fault-source blocking
      farfault demo --report move.html
      farfault demo --json | jq .fault_latency_us
    """
    kind = VmmKind(vmm) if vmm else VmmKind.best()
    ram_bytes = ram or RAM_DEFAULT[kind]
    if ram_bytes % (2 << 20) or ram_bytes < GUEST_RAM_MIN_BYTES:
        raise UsageError(f"--ram {ram_bytes} is not a multiple of 2 MiB from {GUEST_RAM_MIN_BYTES >> 20} MiB on")
    source = choose_fault_source(kind, fault_source)
    end_on_sigterm()
    folder = scene_folder("farfault-demo-")
    record = folder / "move.jsonl"
    config = SceneConfig(
        kind, ram_bytes=ram_bytes, vcpus=vcpus, fault_source=source, receive_flags=("--record", str(record))
    )
    try:
        figures = _play(config, folder, quiet=as_json)
        if report is not None:
            write_report(record, report)
    except FarfaultError as error:
        raise type(error)(error.problem, error.remedy or f"logs are in {folder}") from error
    wrong = figures["verification_errors"]
    if keep:
        figures["folder"] = str(folder)
    elif not wrong:
        shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        click.echo(json.dumps(figures))
    elif keep:
        click.echo(f"kept              {folder}: logs and records")
    if wrong:
        raise VerificationError(f"the guest found {wrong} errors", f"logs are in {folder}")


def _play(config: SceneConfig, folder: Path, *, quiet: bool) -> dict[str, Any]:
    def say(text: str) -> None:
        if not quiet:
            click.echo(text)

    mib = config.ram_bytes >> 20
    with Processes(folder) as processes:
        scene = Scene(config, folder, processes)
        try:
            say(f"VMM               {config.kind.title}; {mib} MiB, {config.vcpus} vCPUs")
            say(f"fault source      {config.fault_source}")
            scene.start_source()
            say(f"source            runs; its guest has verified {scene.counter(scene.source):,} pages")
            scene.start_server()
            scene.start_destination()
            scene.start_receiver()
            say(f"page server       127.0.0.1:{scene.port}; receiver and destination VM wait")
            with progress_bar(enabled=not quiet) as show:
                status = scene.move(show)
            counter_before = scene.counter(scene.source)
            summary = summary_of(status)
            scene.wait_for_progress(counter_before)
            counter_after = scene.counter(scene.destination)
            scene.summary_of_receiver()
            mailboxes, check = scene.check_guest(scene.destination)
            errors = sum(mailbox.errors for mailbox in mailboxes) + check.wrong
            figures = {
                "vmm": config.kind.value,
                **summary,
                "vcpus": config.vcpus,
                "counter_before": counter_before,
                "counter_after": counter_after,
                "verification_errors": errors,
                "verified_pages": check.pages,
                "clock_backwards": sum(mailbox.clock_backwards for mailbox in mailboxes),
            }
            if not quiet:
                _tell(figures, say)
            for problem in check.problems:
                click.echo(f"  {problem}", err=True)
            return figures
        finally:
            scene.remove_ram()


def _tell(figures: dict[str, Any], say: Any) -> None:
    latency = figures["fault_latency_us"]
    by_source = ", ".join(f"{count:,} {name}" for name, count in sorted(figures["faults_by_source"].items()))
    blocked = ", ".join(f"vCPU {vcpu} {seconds:.2f} s" for vcpu, seconds in figures["blocked_s_by_vcpu"].items())
    moved = figures["installed_pages"] + figures["zero_pages"] + figures["counters"].get("existed_pages", 0)
    say(f"moved             {moved:,} pages: {figures['installed_pages']:,} with data, {figures['zero_pages']:,} zero")
    say(f"on the wire       {figures['bytes_on_wire'] / (1 << 20):,.1f} MiB")
    say(f"downtime          {figures['downtime_ms']:.1f} ms")
    say(f"post-copy         {figures['postcopy_s']:.2f} s")
    say(f"demand faults     {figures['demand_faults']:,} ({by_source})")
    say(
        f"fault latency     p50 {latency['p50']:,.0f} us, p90 {latency['p90']:,.0f} us, "
        f"p99 {latency['p99']:,.0f} us, max {latency['max']:,.0f} us"
    )
    say(f"vCPUs waited      {blocked or 'not known for this fault source'}")
    say(f"guest's counter   {figures['counter_before']:,} at the switchover, {figures['counter_after']:,} now")
    verdict = "every page is what the guest left there" if not figures["verification_errors"] else "WRONG"
    say(f"verification      {figures['verified_pages']:,} pages, {figures['verification_errors']} errors: {verdict}")
