"""The command ``farfault migrate``."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from farfault.v1 import receiver_pb2 as rpb
from farfault_cli.errors import PreflightError, UnreachableError, UsageError
from farfault_cli.logs import configure_logging
from farfault_cli.sizes import RATE
from farfault_shim.unix_path import check_socket_path

from farfault_client.migrate.follow import ReceiverClient, progress_bar, verdict_of
from farfault_client.options import FILE, default_state, log_options, source_options
from farfault_client.receive.journal import Journal
from farfault_client.receive.summary import summary_of

RECEIVER_START_TIMEOUT_S = 30.0
CONTROL_NAME = "control"
RECEIVER_POLL_S = 0.02
RECEIVER_END_TIMEOUT_S = 5.0


@click.command()
@source_options
@click.option("--control", type=FILE, help="Control socket of a `farfault receive` that runs already.")
@click.option("--attach", type=FILE, help="Unix socket on which the destination VMM attaches.")
@click.option("--qmp", type=FILE, help="QMP socket of the destination VMM.")
@click.option("--state", type=FILE, help="Folder for the record of the move.")
@click.option("--bandwidth", type=RATE, default=None, help="Cap of the background; 0: none.")
@click.option("--hints", type=FILE, help="Working set of an earlier move (`farfault record`), fetched first.")
@click.option("--verify", is_flag=True, help="Compare all of RAM with the source's before the move is complete.")
@click.option("--check", is_flag=True, help="Preflight only: say what would be refused; stop nothing.")
@click.option("--abort", is_flag=True, help="Bring the source back, if it is not too late.")
@click.option("--resume", is_flag=True, help="Take up a move whose receiver died: finish it or roll it back.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON object, no progress bar.")
@log_options
def migrate(
    source: str | None,
    tls: Path | None,
    insecure: bool,
    admission_token_file: Path | None,
    no_express: bool,
    control: Path | None,
    attach: Path | None,
    qmp: Path | None,
    state: Path | None,
    bandwidth: int | None,
    hints: Path | None,
    verify: bool,
    check: bool,
    abort: bool,
    resume: bool,
    as_json: bool,
    log_level: str,
    json_logs: bool,
) -> None:
    """Move a running VM to this host.

    The source side is reached through its page server only. On the source host:

    \b
      farfault serve --ram /dev/shm/vm.ram --qmp /run/vm.qmp --listen 0.0.0.0:7777 --tls /etc/farfault
    On this host, the destination VMM (any order):
      farfault run --attach /run/ff.sock --ram /dev/shm/vm.ram -- qemu-system-x86_64 ... -incoming defer
      farfault migrate --source src:7777 --tls /etc/farfault --attach /run/ff.sock --qmp /run/vm.qmp
    With a receiver that runs already:
      farfault migrate --control /run/ff.ctl

    Until the hand-over every failure leaves the source VM running. If this command is interrupted the move
    goes on; if the receiver dies the guest waits, and `--resume` takes the move up.
    """
    configure_logging(level=log_level, as_json=json_logs)
    if control is not None:
        if verify:
            raise UsageError("--verify is an option of the receiver", "give it to `farfault receive`")
        figures = asyncio.run(_act(control, check=check, abort=abort, watch=resume, tune=bandwidth, quiet=as_json))
    else:
        if source is None or attach is None or qmp is None:
            raise UsageError(
                "neither --control nor --source, --attach and --qmp were given", "see `farfault migrate --help`"
            )
        state = state or default_state(attach)
        running = running_receiver(state)
        if abort and running is None:
            raise UsageError(
                f"no receiver works on a move in {state}",
                "name its folder with --state, or its control socket with --control",
            )
        if running is not None:
            figures = asyncio.run(_act(running, check=check, abort=abort, watch=resume, tune=bandwidth, quiet=as_json))
            return _tell(figures, as_json=as_json)
        if resume and Journal(state).record is None:
            raise UsageError(f"no move to take up: {state} holds no record", "name its folder with --state")
        arguments = ["--source", source, "--attach", str(attach), "--qmp", str(qmp), "--state", str(state)]
        arguments += ["--tls", str(tls)] if tls else []
        arguments += ["--insecure"] if insecure else []
        arguments += ["--admission-token-file", str(admission_token_file)] if admission_token_file else []
        arguments += ["--no-express"] if no_express else []
        arguments += ["--hints", str(hints)] if hints else []
        arguments += ["--bandwidth", str(bandwidth)] if bandwidth else []
        arguments += ["--verify"] if verify else []
        arguments += ["--log-level", log_level] + (["--json-logs"] if json_logs else [])
        with started_receiver(state, arguments, ends_with_us=check) as own_control:
            figures = asyncio.run(_act(own_control, check=check, watch=resume, quiet=as_json))
    _tell(figures, as_json=as_json)


def _tell(figures: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(figures))
    elif figures:
        click.echo(_sentence(figures))


def running_receiver(state: Path) -> Path | None:
    """The control socket of a receiver that an earlier `farfault migrate` started and that still works; else None."""
    control = state / CONTROL_NAME
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(control))
        except OSError:
            control.unlink(missing_ok=True)  # left by one that was killed
            return None
    return control


@contextmanager
def started_receiver(state: Path, arguments: list[str], *, ends_with_us: bool = False) -> Iterator[Path]:
    """Runs `farfault receive` in a session of its own, so that it outlives us; gives its control socket.

    Args:
        state: its folder; the control socket lies there, where the next `farfault migrate` finds it.
        arguments: of the command.
        ends_with_us: nothing was moved: the receiver is told to end, and gives its lease back.

    Raises:
        FarfaultError: it ended before it listened; with its own words and exit code on standard error.
    """
    control = state / CONTROL_NAME
    check_socket_path(control, "name a shorter folder with --state")
    command = [sys.executable, "-m", "farfault_cli", "receive", *arguments, "--control", str(control), "--json"]
    receiver = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait_for(control, receiver)
        yield control
        if ends_with_us:
            receiver.terminate()
        receiver.wait(RECEIVER_START_TIMEOUT_S)
    except KeyboardInterrupt:
        raise  # the move goes on
    except UnreachableError:
        if code := _exit_code(receiver, at_once=False):
            sys.exit(code)  # it ended before it could be asked, and has said why on standard error
        raise
    except BaseException:
        _exit_code(receiver, at_once=ends_with_us)
        raise


def _wait_for(control: Path, receiver: subprocess.Popen[bytes]) -> None:
    for _ in range(int(RECEIVER_START_TIMEOUT_S / RECEIVER_POLL_S)):
        if control.exists():
            return
        if receiver.poll() is not None:
            # It has said why on standard error, which is ours too.
            sys.exit(receiver.returncode)
        time.sleep(RECEIVER_POLL_S)
    raise UnreachableError("the receiver does not start", "see its log above")


def _exit_code(receiver: subprocess.Popen[bytes], *, at_once: bool) -> int:
    """Of a receiver that ends by itself, lease given back; 0 of one that had to be told to, now or after a while."""
    if not at_once:
        try:
            return max(0, receiver.wait(RECEIVER_END_TIMEOUT_S))
        except subprocess.TimeoutExpired:
            pass
    receiver.terminate()
    return 0


async def _act(
    control: Path,
    *,
    check: bool = False,
    abort: bool = False,
    watch: bool = False,
    tune: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    async with ReceiverClient(control) as receiver:
        if abort:
            await receiver.abort()
            click.echo("aborted: the source VM runs as before", err=True)
            return {}
        if tune is not None:
            await receiver.tune(tune)
        if check:
            return await _check(receiver, quiet=quiet)
        return await _follow(receiver.watch() if watch else receiver.migrate(), quiet=quiet)


async def _check(receiver: ReceiverClient, *, quiet: bool) -> dict[str, Any]:
    checks = await receiver.preflight()
    if not quiet:
        for line in checks:
            click.echo(f"{'ok  ' if line.passed else 'FAIL'} {line.name}: {line.detail}")
            if line.remedy:
                click.echo(f"     remedy: {line.remedy}")
    bad = [line for line in checks if not line.passed]
    if bad and not quiet:
        raise PreflightError(f"{len(bad)} of {len(checks)} checks failed")
    if not quiet:
        return {}
    return {
        "passed": not bad,
        "checks": [
            {"name": line.name, "passed": line.passed, "detail": line.detail, "remedy": line.remedy} for line in checks
        ],
    }


async def _follow(statuses: AsyncIterator[rpb.MigrationStatus], *, quiet: bool) -> dict[str, Any]:
    last = rpb.MigrationStatus()
    with progress_bar(enabled=not quiet and os.isatty(2)) as show:
        async for status in statuses:
            last = status
            show(status)
    if quiet and last.phase != rpb.PHASE_DONE:
        click.echo(json.dumps(summary_of(last)))
    verdict_of(last)
    return summary_of(last)


def _sentence(figures: dict[str, Any]) -> str:
    latency = figures["fault_latency_us"]
    return (
        f"moved: downtime {figures['downtime_ms']:.1f} ms, post-copy {figures['postcopy_s']:.2f} s, "
        f"{figures['installed_pages']:,} pages installed and {figures['zero_pages']:,} zero of "
        f"{figures['guest_pages']:,}; {figures['demand_faults']:,} demand faults ({figures['fault_source']}), "
        f"p50 {latency['p50']:.0f} us, p99 {latency['p99']:.0f} us"
    )
