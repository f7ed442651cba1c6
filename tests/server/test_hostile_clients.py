"""The page server under hostile clients: one kind a test, beside an honest client that must not notice."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
import pytest
from farfault.v1 import pages_pb2 as pb
from farfault_cli.certs import make_certificates
from farfault_cli.tls import channel_credentials, client_ssl_context
from farfault_server.express.listener import CONNECTIONS_MAX
from farfault_server.lanes.limits import REQUEST_BYTES_MAX, LaneLimits
from farfault_server.lanes.streams import STREAMS_PER_LEASE_MAX
from farfault_server.rpc.page_service import LEASES_MAX
from google.protobuf.message import DecodeError
from hostile_clients import ATTACKS, OPEN, PREFACE, SETTINGS, attack, call, connect, frame
from hypothesis import given, settings
from hypothesis import strategies as st
from server_client import (
    LENGTH,
    PAGE,
    TIMEOUT_S,
    Client,
    Express,
    connected,
    eventually,
    page,
    pages_of,
    refused,
    request,
    write_ram,
)
from test_serve_command import Served, served

PAGES = [bytes(PAGE) if number % 5 == 0 else page(number) for number in range(1024)]
PAGES_PER_REQUEST = 64
PAUSE_S = 0.01
STILL_POLLS = 10
DESCRIPTORS_MAX = 120
T = TypeVar("T")
GROWTH_BYTES_MAX = 256 << 20
"""Of both processes of the server together, whatever clients of one lease do. Generous: the figure is printed."""
U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
FETCHES = st.builds(
    pb.FetchRequest,
    request_id=U64,
    priority=st.integers(-(1 << 31), (1 << 31) - 1),
    ranges=st.lists(
        st.builds(
            pb.PageRange,
            region=st.one_of(st.just(0), U32),
            first_page=st.one_of(st.integers(0, len(PAGES) + 1), U64),
            page_count=st.one_of(st.integers(0, 70), U64),
        ),
        max_size=8,
    ),
)
FUZZ = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    return write_ram(tmp_path / "vm.ram", PAGES)


# ---- the honest client -----------------------------------------------------------------------------


async def fetch_all(client: Client) -> None:
    """One stream, every page, each verified."""
    stream = client.stream()
    for first in range(0, len(PAGES), PAGES_PER_REQUEST):
        await stream.write(request(first, (0, first, PAGES_PER_REQUEST)))
        got: list[bytes | str] = []
        while len(got) < PAGES_PER_REQUEST:
            batch = await asyncio.wait_for(stream.read(), TIMEOUT_S)
            assert batch is not grpc.aio.EOF, "the honest client's stream ended"
            got += pages_of(batch)
        assert got == PAGES[first : first + PAGES_PER_REQUEST]
        await asyncio.sleep(PAUSE_S)
    await stream.done_writing()


@contextlib.asynccontextmanager
async def beside_an_honest_client(
    server: Served, credentials: grpc.ChannelCredentials | None = None
) -> AsyncIterator[pb.OpenResponse]:
    """What runs in this context is hostile. Gives what the honest client opened.

    The honest one takes the VM first, fetches all of it again and again meanwhile and once more afterwards, and
    completes. Then the server must live, without one traceback in its log.
    """
    async with connected(server.port, credentials) as client:
        opened = await client.open(pb.LEASE_KIND_MIGRATION)
        is_over = False

        async def fetch_until_over() -> None:
            while not is_over:
                await fetch_all(client)
            await fetch_all(client)

        fetching = asyncio.create_task(fetch_until_over())
        try:
            yield opened
        finally:
            is_over = True
            await fetching
        complete = pb.CompleteRequest(generation=opened.generation, installed_pages=len(PAGES))
        await client.pages.Complete(complete, metadata=client.metadata, timeout=TIMEOUT_S)
    assert server.process.poll() is None
    assert "Traceback" not in server.log.read_text()


# ---- nonsense --------------------------------------------------------------------------------------


async def grpc_answer(client: Client, name: str, message: bytes) -> tuple[list[bytes | str], grpc.StatusCode]:
    """What a stream of this one message gets: pages or their status, and how it ends."""
    raw = client.channel.stream_stream(f"/farfault.v1.PageService/{name}")
    stream = raw(metadata=client.metadata, timeout=TIMEOUT_S)
    await stream.write(message)
    pages: list[bytes | str] = []
    try:
        is_done = False
        while not is_done:
            answer = await stream.read()
            if answer is grpc.aio.EOF:
                break
            batch = pb.PageBatch.FromString(answer)
            pages += pages_of(batch)
            is_done = bool(batch.done_request_ids)
        await stream.done_writing()
    except grpc.aio.AioRpcError as error:
        return pages, error.code()
    return pages, await stream.code()


async def express_answer(client: Client, kind: int, message: bytes) -> tuple[list[bytes | str], bool]:
    """The same over an express lane; whether the server dropped the connection."""
    express = await Express.connect(client.lane(kind))
    assert (await express.hello(client.opened.lease_id, client.opened.token)).code == 0
    express.writer.write(LENGTH.pack(len(message)) + message)
    pages: list[bytes | str] = []
    try:
        while True:
            batch = await express.batch()
            pages += pages_of(batch)
            if batch.done_request_ids:
                return pages, False
    except (asyncio.IncompleteReadError, ConnectionError):
        return pages, True
    finally:
        express.close()


def check_answer(message: bytes, pages: list[bytes | str], was_dropped: bool) -> None:
    """A request is answered range by range; what is none ends the stream."""
    try:
        asked = pb.FetchRequest.FromString(message)
    except DecodeError:
        assert was_dropped
        return
    assert not was_dropped
    kinds: list[bytes | str] = []
    pages_left = LaneLimits().max_request_pages
    for item in asked.ranges or [pb.PageRange()]:
        end = item.first_page + item.page_count
        if item.region != 0 or not item.page_count or end > len(PAGES):
            kinds.append("OUT_OF_RANGE")
        elif item.page_count > pages_left:
            kinds.append("REJECTED")
        else:
            pages_left -= item.page_count
            kinds += PAGES[item.first_page : end]
    assert pages == kinds


class Fuzzing:
    """An event loop under a Hypothesis test, which is synchronous, and contexts that last for all of its examples."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._contexts = contextlib.AsyncExitStack()

    def __enter__(self) -> Fuzzing:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.run(self._contexts.aclose())
        finally:
            self._runner.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def enter(self, context: AbstractAsyncContextManager[T]) -> T:
        return self.run(self._contexts.enter_async_context(context))


def test_fuzzed_page_requests(ram: Path, tmp_path: Path) -> None:
    """Random bytes and random requests on every page stream: right pages, a status for each bad range, or the end."""
    with Fuzzing() as fuzzing:
        server = fuzzing.enter(served(tmp_path, "--ram", ram))
        fuzzing.enter(beside_an_honest_client(server))
        hostile = fuzzing.enter(connected(server.port))
        fuzzing.run(hostile.open())

        async def send(message: bytes) -> None:
            for name in ("Demand", "Background"):
                pages, code = await grpc_answer(hostile, name, message)
                assert code in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT)
                check_answer(message, pages, code is grpc.StatusCode.INVALID_ARGUMENT)
            for kind in (pb.LANE_KIND_EXPRESS, pb.LANE_KIND_EXPRESS_BACKGROUND):
                check_answer(message, *await express_answer(hostile, kind, message))

        @FUZZ
        @given(st.one_of(st.binary(min_size=1, max_size=200), FETCHES.map(pb.FetchRequest.SerializeToString)))
        def fuzz(message: bytes) -> None:
            fuzzing.run(send(message))

        fuzz()


def test_fuzzed_unary_calls(ram: Path, tmp_path: Path) -> None:
    """Random bytes and random fields, mostly of Open: a lease or a clear status, never an internal error."""
    kinds = st.sampled_from([pb.LEASE_KIND_UNSPECIFIED, pb.LEASE_KIND_MIGRATION, 3, -1])
    opens = st.builds(
        pb.OpenRequest,
        protocol_version=st.one_of(st.just(1), U32),
        kind=kinds,
        client_name=st.text(max_size=200),
        features=st.lists(st.text(max_size=20), max_size=5),
        resume_lease_id=st.text(max_size=40),
        resume_token=st.text(max_size=80),
        expected_generation=U64,
    )
    clear = {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAUTHENTICATED,
    }
    names = ("PageService/Open", "PageService/Digest", "PageService/Complete", "SourceService/HandOver")
    with Fuzzing() as fuzzing:
        server = fuzzing.enter(served(tmp_path, "--ram", ram))
        fuzzing.enter(beside_an_honest_client(server))
        hostile = fuzzing.enter(connected(server.port))

        async def send(name: str, message: bytes) -> None:
            call = hostile.channel.unary_unary(f"/farfault.v1.{name}")
            code, _ = await refused(call(message, timeout=TIMEOUT_S))
            assert code in clear, (name, message)

        @FUZZ
        @given(
            st.sampled_from(names),
            st.one_of(st.binary(min_size=1, max_size=200), opens.map(lambda r: r.SerializeToString())),
        )
        def fuzz(name: str, message: bytes) -> None:
            fuzzing.run(send(name, message))

        fuzz()


@pytest.mark.parametrize("kind", ATTACKS, ids=lambda kind: kind.__name__)
async def test_http2_nonsense(ram: Path, tmp_path: Path, kind) -> None:  # type: ignore[no-untyped-def]
    """On the gRPC port, on that of the background process, and by clients that do not read the answers."""
    rng = random.Random(kind.__name__)
    async with served(tmp_path, "--ram", ram) as server, beside_an_honest_client(server) as opened:
        before = resident_bytes(server)
        ports = [server.port, *(lane.port for lane in opened.lanes if lane.kind == pb.LANE_KIND_BACKGROUND)]
        await asyncio.gather(*(attack(port, kind(rng), reads=reads) for port in ports for reads in (True, False)))
        assert resident_bytes(server) - before < GROWTH_BYTES_MAX


async def test_oversize_messages(ram: Path, tmp_path: Path) -> None:
    message = request(1, *[(0, 1, 1)] * REQUEST_BYTES_MAX).SerializeToString()
    async with (
        served(tmp_path, "--ram", ram) as server,
        beside_an_honest_client(server),
        connected(server.port) as hostile,
    ):
        await hostile.open()
        for name in ("Demand", "Background"):
            assert await grpc_answer(hostile, name, message) == ([], grpc.StatusCode.RESOURCE_EXHAUSTED)
        for kind in (pb.LANE_KIND_EXPRESS, pb.LANE_KIND_EXPRESS_BACKGROUND):
            assert await express_answer(hostile, kind, message) == ([], True)
        for name in ("Open", "Digest"):
            call = hostile.channel.unary_unary(f"/farfault.v1.PageService/{name}")
            code, _ = await refused(call(message, metadata=hostile.metadata, timeout=TIMEOUT_S))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


# ---- memory and numbers ----------------------------------------------------------------------------


def processes_of(server: Served) -> list[int]:
    """The server and its background process."""
    pid = server.process.pid
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def resident_bytes(server: Served) -> int:
    """Private resident memory of both processes: their own, not the VM's pages that they map."""
    total = 0
    for pid in processes_of(server):
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Private_"))
    return total


async def test_slow_readers(ram: Path, tmp_path: Path) -> None:
    """As many streams as a lease may have in each process; each asks for a gigabyte, none reads."""
    async with (
        served(tmp_path, "--ram", ram) as server,
        beside_an_honest_client(server),
        contextlib.AsyncExitStack() as stack,
    ):
        hostile = await stack.enter_async_context(separate(server.port))
        opened = await hostile.open()
        before = resident_bytes(server)
        everything = [request(number, (0, 0, len(PAGES))) for number in range(LaneLimits().max_requests_in_flight)]
        for kind in (pb.LANE_KIND_EXPRESS, pb.LANE_KIND_EXPRESS_BACKGROUND):
            for _ in range(STREAMS_PER_LEASE_MAX // 2):
                express = await Express.connect(hostile.lane(kind))
                stack.callback(express.writer.transport.abort)
                assert (await express.hello(opened.lease_id, opened.token)).code == 0
                express.writer.transport.pause_reading()
                express.send(*everything)
        for port in (server.port, hostile.lane(pb.LANE_KIND_BACKGROUND)):
            side = await stack.enter_async_context(separate(port))
            side.opened = opened
            for _ in range(STREAMS_PER_LEASE_MAX // 2):
                stream = side.stream("Background")
                stack.callback(stream.cancel)
                for message in everything:
                    await stream.write(message)
        growth = await settled_bytes(server) - before
        print(f"slow readers: {2 * STREAMS_PER_LEASE_MAX} streams made the server {growth >> 20} MiB larger")
        assert growth < GROWTH_BYTES_MAX


async def settled_bytes(server: Served) -> int:
    """The largest footprint until it stands still."""
    peak, still = 0, 0
    async with asyncio.timeout(TIMEOUT_S):
        while still < STILL_POLLS:
            now = resident_bytes(server)
            still = still + 1 if now <= peak else 0
            peak = max(peak, now)
            await asyncio.sleep(0.1)
    return peak


async def test_a_thousand_streams_on_one_lease(ram: Path, tmp_path: Path) -> None:
    """The lease has its 32; the others are told so, and its own and others' streams go on."""
    async with (
        served(tmp_path, "--ram", ram) as server,
        beside_an_honest_client(server),
        contextlib.AsyncExitStack() as stack,
    ):
        sides = [await stack.enter_async_context(separate(server.port)) for _ in range(5)]
        opened = await sides[0].open()
        for side in sides:
            side.opened = opened
        held = [sides[0].stream() for _ in range(STREAMS_PER_LEASE_MAX)]
        for stream in held:
            await stream.write(request(1, (0, 1, 1)))
            assert pages_of(await stream.read()) == [PAGES[1]]
        more = [side.stream() for side in sides for _ in range(200)][STREAMS_PER_LEASE_MAX:]
        ends = await asyncio.gather(*(refused(stream.read()) for stream in more))
        assert {code for code, _ in ends} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        for stream in held:  # they were not touched
            await stream.write(request(2, (0, 2, 1)))
            assert pages_of(await stream.read()) == [PAGES[2]]


@contextlib.asynccontextmanager
async def separate(port: int) -> AsyncIterator[Client]:
    """A client on a connection of its own: channels to one address share theirs."""
    client = Client(port)
    await client.channel.close()
    options = [("grpc.use_local_subchannel_pool", 1)]
    client.channel = grpc.aio.insecure_channel(f"localhost:{port}", options=options)
    client.pages = type(client.pages)(client.channel)
    try:
        yield client
    finally:
        await client.close()


async def test_three_hundred_connections(ram: Path, tmp_path: Path) -> None:
    """That say nothing, on every port: express closes those over its bound at once, and the rest after 5 s."""
    async with served(tmp_path, "--ram", ram) as server, beside_an_honest_client(server) as opened:
        before = resident_bytes(server)
        ports = {"grpc": server.port} | {lane.kind: lane.port for lane in opened.lanes}
        silent = {name: [await connect(port) for _ in range(300)] for name, port in ports.items()}
        assert resident_bytes(server) - before < GROWTH_BYTES_MAX
        for kind in (pb.LANE_KIND_EXPRESS, pb.LANE_KIND_EXPRESS_BACKGROUND):
            over = silent[kind][CONNECTIONS_MAX:]
            await asyncio.gather(*(closed(reader) for reader, _ in over))
            await asyncio.gather(*(closed(reader) for reader, _ in silent[kind]))
            express = await Express.connect(ports[kind])
            assert (await express.hello("", "")).code == grpc.StatusCode.UNAUTHENTICATED.value[0]
            express.close()
        for _, writer in (connection for some in silent.values() for connection in some):
            writer.transport.abort()


async def test_connections_that_use_up_the_descriptors(ram: Path, tmp_path: Path) -> None:
    """Who is connected goes on; who comes is let in as soon as the hostile ones are gone."""
    async with served(tmp_path, "--ram", ram) as server, beside_an_honest_client(server) as opened:
        pid = server.process.pid
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (DESCRIPTORS_MAX, DESCRIPTORS_MAX))
        hostile = [await connect(server.port) for _ in range(2 * DESCRIPTORS_MAX)]
        descriptors = Path(f"/proc/{pid}/fd")
        await eventually(lambda: len(list(descriptors.iterdir())) == DESCRIPTORS_MAX)
        for _, writer in hostile:
            writer.transport.abort()
        async with separate(server.port) as late:
            await late.resume(opened, opened.generation)


async def closed(reader: asyncio.StreamReader) -> None:
    """Waits until the server closes, by whatever means."""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(TIMEOUT_S):
            while await reader.read(4096):
                pass


async def test_opens_without_end(ram: Path, tmp_path: Path) -> None:
    """From another host, raw: it gets its share and no more; the honest client's host has a share of its own."""
    message = pb.OpenRequest(protocol_version=1, kind=pb.LEASE_KIND_CLONE).SerializeToString()
    opens = PREFACE + frame(SETTINGS, 0, 0) + b"".join(call(stream, OPEN, (), message) for stream in range(1, 401, 2))
    async with served(tmp_path, "--ram", ram) as server, beside_an_honest_client(server) as opened:
        answer = await attack(server.port, opens)
        assert b"opens come too fast" in answer
        assert f"{LEASES_MAX}".encode() in answer, "the leases are bounded as well"
        async with connected(server.port) as again:
            await again.resume(opened, opened.generation)


# ---- who it is -------------------------------------------------------------------------------------


async def test_no_token_wrong_token_and_that_of_another_lease(ram: Path, tmp_path: Path) -> None:
    async with served(tmp_path, "--ram", ram) as server, beside_an_honest_client(server) as opened:
        async with connected(server.port) as hostile:
            own = await hostile.open()
            victim = ("farfault-lease", opened.lease_id)
            cases = {
                (): grpc.StatusCode.UNAUTHENTICATED,
                (victim,): grpc.StatusCode.UNAUTHENTICATED,
                (victim, ("authorization", "Bearer ")): grpc.StatusCode.UNAUTHENTICATED,
                (victim, ("authorization", f"Bearer {own.token}")): grpc.StatusCode.PERMISSION_DENIED,
            }
            for metadata, code in cases.items():
                for name in ("Demand", "Background"):
                    assert (await refused(hostile.stream(name, metadata).read()))[0] is code
                for name, message in (
                    ("Release", pb.ReleaseRequest()),
                    ("Complete", pb.CompleteRequest(generation=opened.generation)),
                    ("Digest", pb.DigestRequest()),
                ):
                    call = getattr(hostile.pages, name)(message, metadata=metadata, timeout=TIMEOUT_S)
                    assert (await refused(call))[0] is code
            for kind in (pb.LANE_KIND_EXPRESS, pb.LANE_KIND_EXPRESS_BACKGROUND):
                for token, number in (("", 16), ("wrong", 7), (own.token, 7)):
                    express = await Express.connect(hostile.lane(kind))
                    assert (await express.hello(opened.lease_id, token)).code == number
                    express.close()
            code, _ = await refused(hostile.open(resume_lease_id=opened.lease_id, resume_token=own.token))
            assert code is grpc.StatusCode.PERMISSION_DENIED
        assert opened.token not in server.log.read_text()


async def test_wrong_certificates(ram: Path, tmp_path: Path) -> None:
    """None, one of another CA, and no TLS at all: no lane answers."""
    make_certificates(tmp_path / "tls")
    make_certificates(tmp_path / "other")
    right = channel_credentials(tmp_path / "tls" / "client")
    ca = (tmp_path / "tls" / "client" / "ca.pem").read_bytes()
    (tmp_path / "other" / "client" / "ca.pem").write_bytes(ca)
    strangers = [None, grpc.ssl_channel_credentials(ca), channel_credentials(tmp_path / "other" / "client")]
    arguments = ("--ram", ram, "--tls", tmp_path / "tls" / "server")
    async with served(tmp_path, *arguments) as server, beside_an_honest_client(server, right) as opened:
        for credentials in strangers:
            for port in (server.port, *(lane.port for lane in opened.lanes if lane.kind == pb.LANE_KIND_BACKGROUND)):
                async with connected(port, credentials) as hostile:
                    hostile.opened = opened
                    assert (await refused(hostile.stream("Background").read()))[0] is grpc.StatusCode.UNAVAILABLE
        context = client_ssl_context(tmp_path / "other" / "client")
        for kind in (pb.LANE_KIND_EXPRESS, pb.LANE_KIND_EXPRESS_BACKGROUND):
            port = next(lane.port for lane in opened.lanes if lane.kind == kind)
            for ssl in (None, context):
                with pytest.raises((OSError, asyncio.IncompleteReadError)):
                    express = await Express.connect(port, ssl)
                    await express.hello(opened.lease_id, opened.token)
