"""``farfault run``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
from farfault_cli.errors import UsageError

from farfault_shim.attach.wire import FaultSource
from farfault_shim.sources.choose import AUTO, REAL_SOURCES, Choice, choose
from farfault_shim.sources.options import host_options

WISHES = (AUTO, *(source.value for source in REAL_SOURCES))


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--attach", required=True, type=click.Path(path_type=Path), help="Unix socket of `farfault receive`.")
@click.option(
    "--ram",
    "ram_names",
    required=True,
    multiple=True,
    metavar="PATH",
    help="File of the VM's RAM, as the memory backend names it; once for each region, in the source's order. "
    "memfd=NAME: a memfd of that name.",
)
@click.option(
    "--fault-source",
    type=click.Choice(WISHES),
    default=AUTO,
    show_default=True,
    help="How vCPUs miss pages; auto takes the best that is safe here (see `farfault probe`).",
)
@host_options
@click.option(
    "--print-env",
    type=click.Choice(["shell", "json"]),
    help="Print the variables for libvirt or systemd instead of starting anything.",
)
@click.argument("vmm", nargs=-1, metavar="-- VMM [ARGUMENT]...", type=click.UNPROCESSED)
def run(
    attach: Path,
    ram_names: tuple[str, ...],
    fault_source: str,
    interface_texts: tuple[str, ...],
    userfaultfd_device_fd: int | None,
    print_env: str | None,
    vmm: tuple[str, ...],
) -> None:
    """Start an unmodified VMM whose missing pages `farfault receive` serves.

    The VMM runs with a preload library that hands its memory over on the attach socket and waits for the
    receiver as long as it takes, now and after every restart of it. This process becomes the VMM.

    \b
    farfault run --attach /run/vm.sock --ram /dev/shm/vm.ram -- \\
      qemu-system-x86_64 -accel kvm -machine q35,memory-backend=ram -m 4G \\
      -object memory-backend-file,id=ram,size=4G,mem-path=/dev/shm/vm.ram,share=on \\
      -qmp unix:/run/vm.qmp,server,nowait -incoming defer

    \b
    For libvirt or systemd, which start the VMM themselves:
    farfault run --attach /run/vm.sock --ram /dev/shm/vm.ram --print-env shell

    Exit codes: those of the VMM once it runs; 2 wrong use, 3 no fault source works here.
    """
    from farfault_shim.launch import checks
    from farfault_shim.launch.environment import as_json, as_shell, merge, shim_variables

    library = checks.find_library()
    if not vmm and print_env is None:
        raise UsageError("no VMM is given", "farfault run ... -- qemu-system-x86_64 ...")
    program = checks.find_vmm(vmm[0]) if vmm else None
    socket_path = checks.check_attach(attach)
    ram = checks.check_ram(ram_names)
    choice = _choose(fault_source, interface_texts, userfaultfd_device_fd)
    variables = shim_variables(library, socket_path, ram, choice, userfaultfd_device_fd)
    if print_env is not None:
        click.echo(as_shell(variables) if print_env == "shell" else as_json(variables), nl=False)
        return
    assert program is not None
    for name in checks.ram_not_on_command_line(ram, ram_names, vmm):
        click.echo(f"farfault run: warning: no argument of the VMM names {name}", err=True)
    _announce(choice, passed_over_silently=() if interface_texts else (FaultSource.KERNEL_NOWAIT,))
    sys.stdout.flush()
    os.execve(program, list(vmm), merge(os.environ, variables))


def _choose(wish: str, interface_texts: tuple[str, ...], device_fd: int | None) -> Choice:
    """The fault source for a real VMM. Raises FaultSourceUnavailableError where none works."""
    from farfault_shim.sources.choose import FaultSourceUnavailableError
    from farfault_shim.sources.host import find_host_facts
    from farfault_shim.sources.kernel_interface import parse_interface
    from farfault_shim.sources.userfault import find_userfaultfd

    interfaces = [parse_interface(text) for text in interface_texts]
    if any(interface.has_bitmap for interface in interfaces):
        raise UsageError(
            "the preload library does not keep a userfault bitmap",
            "use a VMM that attaches by itself, or another --kernel-interface",
        )
    facts = find_host_facts(interfaces, find_userfaultfd(device_fd), device_fd)
    choice = choose(facts, wish, REAL_SOURCES)
    if choice.source is None:
        blocking = choice.verdict_of(FaultSource.BLOCKING)
        raise FaultSourceUnavailableError(f"no fault source works here: {blocking.reason}", blocking.remedy)
    return choice


def _announce(choice: Choice, passed_over_silently: tuple[FaultSource, ...]) -> None:
    """One line: which fault source, and why not a better one."""
    assert choice.source is not None
    better = choice.verdicts[: REAL_SOURCES.index(choice.source)]
    why = "".join(
        f"; not {verdict.source.value}: {verdict.reason}"
        for verdict in better
        if verdict.source not in passed_over_silently
    )
    click.echo(f"farfault run: fault source {choice.source.value}{why}", err=True)
