"""``farfault reference-vmm``."""

from __future__ import annotations

import json
from pathlib import Path

import click
from farfault_cli.errors import UsageError
from farfault_cli.logs import configure_logging
from farfault_cli.sizes import SIZE


@click.command("reference-vmm")
@click.option("--ram", type=click.Path(path_type=Path), required=True, help="RAM file; best in /dev/shm. It stays.")
@click.option("--size", type=SIZE, default="128MiB", show_default=True, help="RAM.")
@click.option("--vcpus", type=click.IntRange(1, 64), default=1, show_default=True, help="Number of vCPUs.")
@click.option(
    "--machine",
    type=click.Choice(["pc", "q35", "flat"]),
    default="pc",
    show_default=True,
    help="How RAM is split around the PCI hole below 4 GiB.",
)
@click.option("--qmp", type=click.Path(path_type=Path), help="Serve QMP on this unix socket.")
@click.option("--incoming", type=click.Choice(["defer"]), help="Wait for migrate-incoming instead of booting.")
@click.option("--paused", is_flag=True, help="Do not run before the QMP command cont.")
@click.option("--attach", type=click.Path(path_type=Path), help="Get missing pages from the receiver at this socket.")
@click.option(
    "--fault-source",
    type=click.Choice(["auto", "stock-nowait", "blocking"]),
    default="auto",
    show_default=True,
    help="How vCPUs miss pages; auto takes the best that is safe here (farfault probe).",
)
@click.option("--simulated", is_flag=True, help="Use the simulated KVM instead of /dev/kvm.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what the simulated KVM does at random.")
@click.option(
    "--profile",
    type=click.Choice(["plain", "rough"]),
    default="plain",
    show_default=True,
    help="Of the simulated KVM: annotated exits only, or every form of exit and race.",
)
@click.option("--random/--ascending", default=False, show_default=True, help="Order in which the guest visits pages.")
@click.option(
    "--pages", type=click.IntRange(min=1), help="Pages that the guest works on; all from 16 MiB on if not given."
)
@click.option("--kvmclock/--no-kvmclock", default=True, show_default=True, help="The guest turns kvmclock on.")
@click.option(
    "--passes", type=click.IntRange(min=1), help="End when every vCPU has done so many rounds, and verify RAM."
)
@click.option("--json", "as_json", is_flag=True, help="With --passes: the result as JSON.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="Least level logged.",
)
@click.option("--json-logs", is_flag=True, help="One JSON object a log line.")
def reference_vmm(
    ram: Path,
    size: int,
    vcpus: int,
    machine: str,
    qmp: Path | None,
    incoming: str | None,
    paused: bool,
    attach: Path | None,
    fault_source: str,
    simulated: bool,
    seed: int,
    profile: str,
    random: bool,
    pages: int | None,
    kvmclock: bool,
    passes: int | None,
    as_json: bool,
    log_level: str,
    json_logs: bool,
) -> None:
    """A small VMM that can be moved while it runs: an example for VMM authors, and a VM for tests.

    Its guest fills RAM, then verifies and changes every page, round after round. On a host without /dev/kvm, use
    --simulated: the same VMM on a KVM written in Python.

    \b
    Does KVM work here? Two rounds on four vCPUs, then check all of RAM:
      farfault reference-vmm --ram /dev/shm/vm.ram --vcpus 4 --passes 2
    \b
    A source that can be moved:
      farfault reference-vmm --ram /dev/shm/src.ram --qmp /run/src.qmp
    \b
    Its destination; pages come from the receiver at /run/ff.sock (farfault receive --attach /run/ff.sock):
      farfault reference-vmm --ram /dev/shm/dst.ram --qmp /run/dst.qmp --incoming defer --attach /run/ff.sock

    Start both sides with the same --size, --vcpus, --machine and --simulated. Exit codes: 0 ended as asked, 1 the VM
    failed, 2 wrong use, 7 the guest or RAM is wrong.
    """
    from farfault_shim.refvmm.program import Options, run

    configure_logging(level=log_level, as_json=json_logs)
    if incoming and qmp is None:
        raise UsageError("--incoming defer without --qmp: nobody could tell it to load", "add --qmp PATH")
    options = Options(
        ram=ram,
        size_bytes=size,
        vcpus=vcpus,
        machine=machine,
        qmp=qmp,
        incoming=incoming is not None,
        paused=paused,
        attach=attach,
        fault_source=fault_source,
        simulated=simulated,
        seed=seed,
        profile=profile,
        random_order=random,
        pages=pages,
        kvmclock=kvmclock,
        passes=passes,
    )
    result = run(options)
    if result is not None:
        click.echo(json.dumps(result.as_dict()) if as_json else str(result))
        result.raise_if_wrong()
