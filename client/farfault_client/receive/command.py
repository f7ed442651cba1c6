"""The command ``farfault receive``."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from pathlib import Path

import click
from farfault.v1 import receiver_pb2 as rpb
from farfault_cli.errors import FarfaultError, UsageError
from farfault_cli.logs import configure_logging
from farfault_cli.sizes import RATE

from farfault_client.engine import EngineConfig
from farfault_client.metrics.observe import observe
from farfault_client.metrics.options import ObserveOptions, observe_options
from farfault_client.options import FILE, default_state, log_options, source_options
from farfault_client.receive.control import ControlService, serve_control
from farfault_client.receive.endings import outcome, told_to_end
from farfault_client.receive.journal import Step
from farfault_client.receive.receiver import Receiver, ReceiverConfig
from farfault_client.receive.summary import summary_of
from farfault_client.session.connect import session_config

logger = logging.getLogger(__name__)


@click.command()
@source_options
@click.option("--attach", type=FILE, required=True, help="Unix socket on which the VMM attaches.")
@click.option("--qmp", type=FILE, help="QMP socket of the destination VMM. Without it only memory is served.")
@click.option("--control", type=FILE, help="Unix socket for `farfault migrate`, `top` and scripts.")
@click.option("--state", type=FILE, help="Folder for the record of the move. Default: by the attach socket's name.")
@click.option("--now", is_flag=True, help="Move the VM as soon as it is attached, without `farfault migrate`.")
@click.option("--bandwidth", type=RATE, default=0, help="Cap of the background; demand has none.")
@click.option("--hints", type=FILE, help="Working set of an earlier move (`farfault record`), fetched first.")
@click.option("--allow-uid", type=int, multiple=True, help="User whose VMM may attach, besides root and our own.")
@click.option("--verify", is_flag=True, help="Compare all of RAM with the page server's before the move is complete.")
@click.option("--name", default="farfault", show_default=True, help="Name in the page server's log.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
@observe_options
@log_options
def receive(
    source: str | None,
    tls: Path | None,
    insecure: bool,
    admission_token_file: Path | None,
    no_express: bool,
    attach: Path,
    qmp: Path | None,
    control: Path | None,
    state: Path | None,
    now: bool,
    bandwidth: int,
    hints: Path | None,
    allow_uid: tuple[int, ...],
    verify: bool,
    name: str,
    as_json: bool,
    metrics: str | None,
    slow_fault: float,
    record: Path | None,
    log_level: str,
    json_logs: bool,
) -> None:
    """Receive one VM's memory by post-copy, on the destination host.

    Attaches a VMM started with `farfault run` (or any VMM that hands its userfaultfd over as Firecracker does),
    fetches each page that it misses, streams the rest behind, and ends when every page is installed.

    \b
    A whole VM, moved by `farfault migrate --control /run/ff.ctl`:
      farfault receive --source src:7777 --attach /run/ff.sock --qmp /run/vm.qmp --control /run/ff.ctl
    Memory only (a snapshot, a VMM author's own protocol):
      farfault receive --source src:7777 --attach /run/ff.sock

    It may be killed at any time: the guest waits, and the same command takes the move up where it was.
    SIGTERM ends it in the same safe way.
    """
    configure_logging(level=log_level, as_json=json_logs)
    if source is None:
        raise UsageError("--source HOST:PORT is missing", "name the page server of the VM")
    if qmp is None and now:
        raise UsageError("--now needs --qmp", "memory alone is served at once anyway")
    if qmp is not None and control is None and not now:
        raise UsageError("nobody could start the move", "give --control for `farfault migrate`, or --now")
    config = ReceiverConfig(
        session=session_config(
            source,
            tls=tls,
            insecure=insecure,
            admission_token_file=admission_token_file,
            express=not no_express,
            name=name,
        ),
        attach=attach,
        qmp=qmp,
        state=state or default_state(attach),
        engine=EngineConfig(background_bytes_per_s=bandwidth),
        hints=hints,
        allowed_uids=allow_uid,
        verify=verify,
    )
    status = _run(config, control, ObserveOptions(metrics, slow_fault, record), now=now)
    figures = summary_of(status)
    if as_json:
        click.echo(json.dumps(figures))
    else:
        click.echo(
            f"received {figures['installed_pages']} pages, {figures['zero_pages']} zero, "
            f"{figures['demand_faults']} demand faults, in {figures['postcopy_s']:.2f} s"
        )


def _run(config: ReceiverConfig, control: Path | None, watched: ObserveOptions, *, now: bool) -> rpb.MigrationStatus:
    import uvloop
    from farfault_cli.runtime import be_urgent, calm_collector, keep_freed_memory

    keep_freed_memory()
    calm_collector()
    be_urgent()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_receive(config, control, watched, now=now))


async def _receive(
    config: ReceiverConfig, control: Path | None, watched: ObserveOptions, *, now: bool
) -> rpb.MigrationStatus:
    receiver = Receiver(config)
    loop = asyncio.get_running_loop()
    main = asyncio.current_task()
    assert main is not None
    loop.add_signal_handler(signal.SIGTERM, main.cancel)
    loop.add_signal_handler(signal.SIGUSR1, lambda: logger.info("%s", receiver.status()))
    asked = asyncio.Event()
    if now:
        asked.set()
    ends: list[object] = []
    try:
        step = await receiver.start()
        ends.append(await observe(receiver, watched))
        if control is not None:
            ends.append(await serve_control(control, ControlService(receiver, asked.set)))
        await _drive(receiver, step, asked)
        return receiver.status()
    except FarfaultError as error:
        seen = outcome(receiver.journal, error)
        receiver.fail(seen)
        await receiver.give_back()
        raise seen from error
    except asyncio.CancelledError:
        ended = told_to_end(receiver.journal)
        receiver.fail(ended)
        await receiver.give_back()
        raise ended from None
    finally:
        for end in ends:
            await end()  # type: ignore[operator]
        await receiver.close()


async def _drive(receiver: Receiver, step: Step, asked: asyncio.Event) -> None:
    """What this receiver is for, from where the one before it was interrupted."""
    if receiver.config.qmp is None:
        await receiver.serve_memory()
    elif step is Step.OPENED:
        await asked.wait()
        await receiver.move()
    else:
        await receiver.take_up(step)
