"""``farfault serve``."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from farfault_cli.errors import UnreachableError, UsageError
from farfault_cli.logs import configure_logging
from farfault_cli.sizes import SIZE, SIZE_EXAMPLES

if TYPE_CHECKING:
    from farfault_server.leases.store import Store
    from farfault_server.memory import PageRegion
    from farfault_server.server import PageServer
    from farfault_server.source_vm import SourceVmm

logger = logging.getLogger(__name__)

DEFAULT_LISTEN: Final = "127.0.0.1:7777"
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
ADMISSION_VARIABLE: Final = "FARFAULT_ADMISSION_TOKEN_FILE"


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The command line of ``farfault serve``; the fields are the options."""

    ram: tuple[str, ...]
    pid: int | None
    synthetic: int | None
    seed: int
    qmp: Path | None
    is_frozen: bool
    state: Path | None
    abandon: bool
    listen: str
    port_file: Path | None
    express_port: int
    has_express: bool
    background_port: int
    express_background_port: int
    has_background_process: bool
    metrics: str | None
    log_level: str
    json_logs: bool
    tls: Path | None
    is_insecure: bool
    admission_token_file: Path | None
    leases_max: int


@click.command(short_help="Serve the memory of a VM, page by page.")
@click.option("--ram", multiple=True, metavar="WHAT", help="RAM file; repeat for several regions, in guest order.")
@click.option("--pid", type=int, help="Take --ram from this process: PATH, fd:N or memfd=NAME.")
@click.option("--synthetic", type=SIZE, help="Serve made-up memory of this size instead, for load tests.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the synthetic memory.")
@click.option("--qmp", type=click.Path(path_type=Path), help="QMP socket of the source VMM: lets a client move the VM.")
@click.option("--frozen", is_flag=True, help="The VM is stopped already; assumed without --qmp.")
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    help="Directory that keeps leases over a restart.  [default with --qmp: QMP.farfault]",
)
@click.option("--abandon", is_flag=True, help="Take a suspended VM back from a destination that is gone: it runs.")
@click.option("--listen", default=DEFAULT_LISTEN, show_default=True, metavar="HOST:PORT", help="Port 0: any.")
@click.option("--express-port", type=click.IntRange(0, 65535), default=0, show_default=True, help="0: any.")
@click.option("--express/--no-express", "has_express", default=True, help="Answer urgent pages without gRPC, too.")
@click.option("--background-port", type=click.IntRange(0, 65535), default=0, show_default=True, help="0: any.")
@click.option("--express-background-port", type=click.IntRange(0, 65535), default=0, show_default=True, help="0: any.")
@click.option(
    "--background-process/--no-background-process",
    "has_background_process",
    default=True,
    help="Serve bulk from a process of its own.",
)
@click.option("--tls", type=click.Path(path_type=Path), help="Directory with cert.pem, key.pem and ca.pem.")
@click.option("--insecure", is_flag=True, help="Allow other hosts to connect without TLS.")
@click.option("--port-file", type=click.Path(path_type=Path), help="Write the bound port here when ready.")
@click.option(
    "--admission-token-file",
    type=click.Path(path_type=Path),
    envvar=ADMISSION_VARIABLE,
    help="Only clients that show the token in this file may open a lease.",
)
@click.option("--leases-max", type=click.IntRange(1, 1024), default=64, show_default=True, help="Leases at a time.")
@click.option("--metrics", metavar="HOST:PORT", help="Answer Prometheus here.")
@click.option("--log-level", type=click.Choice(LOG_LEVELS), default="info", show_default=True, help="Least to log.")
@click.option("--json-logs", is_flag=True, help="One JSON object a line.")
def serve(*, frozen: bool, insecure: bool, log_level: str, json_logs: bool, **options: Any) -> None:
    """Serve the memory of a VM, page by page.

    The memory is a RAM file that the VMM maps shared, the memory of a running VMM, a snapshot, or made up from a
    seed. With --qmp the server can also stop the VM and hand it over to a destination.

    \b
    A VM that can be moved (QEMU: -object memory-backend-file,mem-path=/dev/shm/vm.ram,share=on,...):
        farfault serve --ram /dev/shm/vm.ram --qmp /run/vm.qmp
    The memfd of a running QEMU:
        farfault serve --pid 4711 --ram memfd=pc.ram --qmp /run/vm.qmp
    A snapshot for many readers:
        farfault serve --ram vm.snapshot
    64 GiB for a load test, without any RAM:
        farfault serve --synthetic 64GiB --seed 7

    SIGTERM ends the server and never touches the VM; SIGUSR1 writes its state to the log.
    """
    configure_logging(level=log_level, as_json=json_logs)
    import uvloop
    from farfault_cli.runtime import be_urgent, calm_collector, keep_freed_memory

    keep_freed_memory()
    calm_collector()
    be_urgent()
    named = ServeOptions(is_frozen=frozen, is_insecure=insecure, log_level=log_level, json_logs=json_logs, **options)
    uvloop.run(run(named))


async def run(options: ServeOptions) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        UsageError: an option or what it names is wrong.
    """
    from farfault_server.server import PageServer, ServerConfig, read_token_file

    if options.is_frozen and options.qmp is not None:
        raise UsageError("--frozen and --qmp exclude each other", "with --qmp the server knows the state of the VM")
    host, port = parse_address(options.listen)
    check_exposure(host, options)
    token_file = options.admission_token_file
    config = ServerConfig(
        host=host,
        port=port,
        express_port=options.express_port if options.has_express else None,
        background_port=options.background_port if options.has_background_process else None,
        express_background_port=options.express_background_port if options.has_express else None,
        tls=options.tls,
        log_level=options.log_level,
        json_logs=options.json_logs,
        leases_max=options.leases_max,
        admission_token=read_token_file(token_file) if token_file is not None else None,
        abandon=options.abandon,
    )
    async with AsyncExitStack() as stack:
        regions, store = open_regions(options), open_store(options)
        server = PageServer(regions, config, store, await connect_vmm(options.qmp, store))
        await server.start()
        stack.push_async_callback(server.stop)
        for region in server.regions:
            logger.info("serving %s (%s), %d MiB", region.name, region.backing, region.size_bytes >> 20)
        logger.info("listening on %s:%d", host, server.port)
        if options.metrics is not None:
            start_metrics(server, options.metrics)
        if options.port_file is not None:
            write_port(options.port_file, server.port)
        await wait_for_end(server)
        logger.info("ending; the VM stays as it is")


def parse_address(text: str) -> tuple[str, int]:
    """``HOST:PORT``, with brackets around an IPv6 host.

    Raises:
        UsageError: it is no such thing.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{text!r} is not an address", "give HOST:PORT, for example 0.0.0.0:7777 or [::1]:7777")
    return host.removeprefix("[").removesuffix("]"), int(port)


def start_metrics(server: PageServer, address: str) -> None:
    """Opens the metrics port.

    Raises:
        UsageError: the address is none, or cannot be had.
    """
    from farfault_server.metrics import serve_metrics

    host, port = parse_address(address)
    logger.info("metrics on http://%s:%d/metrics", host, serve_metrics(server, host, port))


def check_exposure(host: str, options: ServeOptions) -> None:
    """Guest memory does not leave this host in the clear unless the operator says so.

    Raises:
        UsageError: another host could connect and there is no TLS.
    """
    if options.tls is not None or options.is_insecure or is_loopback(host):
        return
    raise UsageError(
        f"listening on {host} without TLS would show guest memory to the network",
        "give --tls DIR (`farfault certs` makes certificates for a trial), or --insecure on a network you trust",
    )


def is_loopback(host: str) -> bool:
    """Whether only this host can connect to the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_regions(options: ServeOptions) -> list[PageRegion]:
    """The memory that the options name.

    Raises:
        UsageError: with what is wrong.
    """
    from farfault_server.memory.opening import REGIONS_MAX, open_ram
    from farfault_server.memory.synthetic_region import PAGE_SIZE_BYTES, SyntheticRegion

    if (options.synthetic is None) == (not options.ram):
        raise UsageError("give either --ram or --synthetic", "for example: farfault serve --ram /dev/shm/vm.ram")
    if options.synthetic is not None:
        if options.synthetic == 0 or options.synthetic % PAGE_SIZE_BYTES:
            raise UsageError(
                f"--synthetic {options.synthetic} is not a positive multiple of {PAGE_SIZE_BYTES} bytes",
                f"examples: {SIZE_EXAMPLES}",
            )
        return [SyntheticRegion(options.seed, 0, options.synthetic)]
    if len(options.ram) > REGIONS_MAX:
        raise UsageError(f"more than {REGIONS_MAX} regions", "give the VM fewer, larger memory backends")
    if options.pid is not None and options.qmp is None and not options.is_frozen:
        logger.warning("process %d must not run its VM while its memory is served; --frozen says that", options.pid)
    return [open_ram(ram, options.pid) for ram in options.ram]


def open_store(options: ServeOptions) -> Store:
    """Where leases are kept. With control of a VM they always are: a record decides who owns it."""
    from farfault_server.leases.store import DirectoryStore, MemoryStore

    state = options.state
    if state is None and options.qmp is not None:
        state = options.qmp.with_name(options.qmp.name + ".farfault")
    return MemoryStore() if state is None else DirectoryStore(state)


async def connect_vmm(qmp: Path | None, store: Store) -> SourceVmm | None:
    """Control of the VMM, where there is one.

    After the hand-over its VMM is not needed any more: the memory is in a file, and is served without it.

    Raises:
        UnreachableError: it cannot be had, and the VM is still its own.
    """
    if qmp is None:
        return None
    from farfault_vmm.qmp import QmpVmm

    from farfault_server.leases.phases import GONE
    from farfault_server.source_vm import GoneVmm

    try:
        return await QmpVmm.connect(qmp)
    except UnreachableError as error:
        book = store.load()
        if book is None or book.phase not in GONE:
            raise
        logger.warning("%s; the VM was %s, so its memory is served without it", error.problem, book.phase.value)
        return GoneVmm(error)


def write_port(path: Path, port: int) -> None:
    """Whole or not at all: a script may read it as soon as it is there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(f"{port}\n")
    temporary.replace(path)


async def wait_for_end(server: PageServer) -> None:
    """Returns at SIGTERM or SIGINT."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    loop.add_signal_handler(signal.SIGUSR1, log_state, server)
    await ended.wait()


def log_state(server: PageServer) -> None:
    """For SIGUSR1."""
    book = server.keeper.book
    logger.info("state: VM %s, generation %d, %d leases", book.phase.value, book.generation, len(book.leases))
    for lease in book.leases.values():
        logger.info(
            "state: lease %s of %r: kind %d, %d streams, seen %.0f s ago",
            lease.lease_id,
            lease.client_name,
            lease.kind,
            server.streams.count(lease.lease_id),
            server.keeper.idle_s(lease.lease_id),
        )
    for lane, stats in server.lane_stats().items():
        logger.info("state: %s %s", lane, stats.to_json())
