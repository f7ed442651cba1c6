"""Leases and pages over a real connection."""

import asyncio
import os
import signal

import grpc
import grpc.aio
import pytest
from farfault.digest import DIGEST_MODULUS, pages_digest
from farfault.synthetic import synthetic_page
from farfault.v1 import pages_pb2 as pb
from farfault_cli.certs import make_certificates
from farfault_cli.errors import FarfaultError, UsageError
from farfault_cli.tls import channel_credentials, client_ssl_context
from farfault_server.background import process as process_module
from farfault_server.express.connection import BATCHES_PER_TURN_MAX
from farfault_server.lanes.limits import REQUEST_BYTES_MAX
from farfault_server.lanes.streams import STREAMS_PER_LEASE_MAX
from farfault_server.leases.store import DirectoryStore
from farfault_server.memory.synthetic_region import SyntheticRegion
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from server_client import (
    LENGTH,
    PAGE,
    TIMEOUT_S,
    Express,
    collect,
    connected,
    eventually,
    page,
    pages_of,
    refused,
    request,
    serving,
    write_ram,
)

PAGES = [bytes(PAGE) if number % 5 == 0 else page(number) for number in range(200)]


@pytest.fixture
def ram(tmp_path):
    return write_ram(tmp_path / "vm.ram", PAGES)


@pytest.mark.parametrize("lane", ["Demand", "Background"])
async def test_pages_come_as_they_are(ram, lane):
    async with serving(ram) as server, connected(server.port) as client:
        opened = await client.open()
        assert opened.vm_state == pb.VM_STATE_FROZEN
        assert [(region.size_bytes, region.page_size_bytes) for region in opened.regions] == [(200 * PAGE, PAGE)]
        assert await client.fetch((0, 0, 200), name=lane) == PAGES
        assert await client.fetch((0, 7, 1), (0, 100, 3), name=lane) == [PAGES[7], *PAGES[100:103]]


async def test_regions_lie_end_to_end(ram, tmp_path):
    other = write_ram(tmp_path / "other.ram", [page(1000)] * 3)
    async with serving(ram, other) as server, connected(server.port) as client:
        opened = await client.open()
        assert [region.offset_bytes for region in opened.regions] == [0, 200 * PAGE]
        assert await client.fetch((1, 2, 1), (0, 1, 1)) == [page(1000), PAGES[1]]


async def test_what_waits_travels_together(ram):
    async with serving(ram) as server, connected(server.port) as client:
        await client.open()
        stream = client.stream()
        await stream.write(request(0, (0, 1, 1)))
        await collect(stream.read, {0})
        for number in range(1, 100):
            await stream.write(request(number, (0, number, 1)))
        pages = await collect(stream.read, set(range(1, 100)))
        assert sorted(pages) == sorted(PAGES[1:100])
        assert server.stats.demand.requests == 100
        assert server.stats.demand.batches <= 100


async def test_bad_ranges_leave_the_stream_alive(ram):
    async with serving(ram) as server, connected(server.port) as client:
        await client.open()
        stream = client.stream()
        await stream.write(request(1, (9, 0, 1), (0, 199, 2), (0, 3, 1)))
        assert await collect(stream.read, {1}) == ["OUT_OF_RANGE", "OUT_OF_RANGE", PAGES[3]]
        await stream.write(request(2, (0, 4, 1)))
        assert await collect(stream.read, {2}) == [PAGES[4]]


async def test_a_file_that_was_cut_short_is_an_error_of_its_pages(ram):
    async with serving(ram) as server, connected(server.port) as client:
        await client.open()
        os.truncate(ram, 100 * PAGE)
        assert await client.fetch((0, 99, 2), (0, 1, 1)) == [PAGES[99], "IO_ERROR", PAGES[1]]


@pytest.mark.parametrize("name", ["Demand", "Background"])
async def test_nonsense_ends_only_its_stream(ram, name):
    async with serving(ram) as server, connected(server.port) as client:
        await client.open()
        raw = client.channel.stream_stream(f"/farfault.v1.PageService/{name}")
        stream = raw(metadata=client.metadata, timeout=TIMEOUT_S)
        await stream.write(b"\xff\xff\xff")
        assert (await refused(stream.read()))[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert await client.fetch((0, 1, 1)) == [PAGES[1]]


async def test_an_oversize_request_ends_only_its_stream(ram):
    async with serving(ram) as server, connected(server.port) as client:
        await client.open()
        stream = client.stream()
        await stream.write(request(1, *[(0, 1, 1)] * 50_000))
        assert (await refused(stream.read()))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await client.fetch((0, 1, 1)) == [PAGES[1]]


@pytest.mark.parametrize("name", ["Open", "Complete", "Digest", "Release"])
async def test_nonsense_in_a_unary_call_is_an_invalid_argument(ram, name):
    async with serving(ram) as server, connected(server.port) as client:
        await client.open()
        raw = client.channel.unary_unary(f"/farfault.v1.PageService/{name}")
        code, message = await refused(raw(b"\xff\xff\xff", metadata=client.metadata, timeout=TIMEOUT_S))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert message == f"the message is no {name}Request"
        suspend = client.channel.unary_stream("/farfault.v1.SourceService/Suspend")
        call = suspend(b"\xff\xff\xff", metadata=client.metadata, timeout=TIMEOUT_S)
        assert (await refused(call.read()))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_who_may_not(ram):
    async with serving(ram) as server, connected(server.port) as client:
        opened = await client.open()
        lease = ("farfault-lease", opened.lease_id)
        cases = {
            (): grpc.StatusCode.UNAUTHENTICATED,
            (lease,): grpc.StatusCode.UNAUTHENTICATED,
            (lease, ("authorization", opened.token)): grpc.StatusCode.UNAUTHENTICATED,
            (lease, ("authorization", "Bearer wrong")): grpc.StatusCode.PERMISSION_DENIED,
            (("farfault-lease", "no"), ("authorization", f"Bearer {opened.token}")): grpc.StatusCode.PERMISSION_DENIED,
        }
        for metadata, code in cases.items():
            for name in ("Demand", "Background"):
                assert (await refused(client.stream(name, metadata).read()))[0] is code
            for name, message in (
                ("Complete", pb.CompleteRequest()),
                ("Release", pb.ReleaseRequest()),
                ("Digest", pb.DigestRequest()),
            ):
                call = getattr(client.pages, name)(message, metadata=metadata, timeout=TIMEOUT_S)
                assert (await refused(call))[0] is code
            for name, message in (
                ("DescribeVm", pb.DescribeVmRequest()),
                ("HandOver", pb.HandOverRequest()),
                ("Resume", pb.ResumeRequest()),
            ):
                call = getattr(client.source, name)(message, metadata=metadata, timeout=TIMEOUT_S)
                assert (await refused(call))[0] is code
            suspend = client.source.Suspend(pb.SuspendRequest(), metadata=metadata, timeout=TIMEOUT_S)
            assert (await refused(suspend.read()))[0] is code


async def test_open_refuses_with_a_remedy(ram):
    async with serving(ram, leases_max=2) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        code, message = await refused(client.open(pb.LEASE_KIND_MIGRATION))
        assert code is grpc.StatusCode.ALREADY_EXISTS
        assert "\n  remedy: " in message
        assert (await refused(client.open(protocol_version=2)))[0] is grpc.StatusCode.FAILED_PRECONDITION
        assert (await refused(client.open(expected_generation=1)))[0] is grpc.StatusCode.FAILED_PRECONDITION
        assert (await refused(client.open(kind=0)))[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert (await refused(client.open(client_name="n" * 129)))[0] is grpc.StatusCode.INVALID_ARGUMENT
        await client.open()
        assert (await refused(client.open()))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_opens_that_come_too_fast(ram):
    async with serving(ram) as server, connected(server.port) as client:
        opened = await client.open()
        codes = set()
        for _ in range(300):
            try:
                await client.resume(opened)
            except grpc.aio.AioRpcError as error:
                codes.add(error.code())
                break
        assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED}


async def test_admission_token(ram):
    async with serving(ram, admission_token="sesame") as server, connected(server.port) as client:
        assert (await refused(client.open()))[0] is grpc.StatusCode.UNAUTHENTICATED
        wrong = (("authorization", "Bearer no"),)
        assert (await refused(client.open(metadata=wrong)))[0] is grpc.StatusCode.PERMISSION_DENIED
        await client.open(metadata=(("authorization", "Bearer sesame"),))
        assert await client.fetch((0, 1, 1)) == [PAGES[1]]


async def test_release_ends_streams_and_is_idempotent(ram):
    async with serving(ram) as server, connected(server.port) as client:
        await client.open()
        stream = client.stream()
        await stream.write(request(1, (0, 1, 1)))
        await collect(stream.read, {1})
        for _ in range(2):
            await client.pages.Release(pb.ReleaseRequest(), metadata=client.metadata, timeout=TIMEOUT_S)
        assert await asyncio.wait_for(stream.read(), TIMEOUT_S) is grpc.aio.EOF
        assert (await refused(client.stream().read()))[0] is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_snapshot_is_complete_once(ram):
    async with serving(ram) as server, connected(server.port) as client:
        opened = await client.open(pb.LEASE_KIND_MIGRATION)
        complete = pb.CompleteRequest(generation=opened.generation, installed_pages=200)
        wrong = pb.CompleteRequest(generation=opened.generation + 1)
        call = client.pages.Complete(wrong, metadata=client.metadata, timeout=TIMEOUT_S)
        assert (await refused(call))[0] is grpc.StatusCode.FAILED_PRECONDITION
        for _ in range(2):
            await client.pages.Complete(complete, metadata=client.metadata, timeout=TIMEOUT_S)
        assert (await client.resume(opened)).vm_state == pb.VM_STATE_COMPLETED


async def test_streams_of_a_lease_are_bounded(ram):
    async with serving(ram) as server, connected(server.port) as client:
        await client.open()
        streams = [client.stream() for _ in range(STREAMS_PER_LEASE_MAX)]
        for stream in streams:
            await stream.write(request(1, (0, 1, 1)))
            await collect(stream.read, {1})
        assert (await refused(client.stream().read()))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        streams[0].cancel()
        await eventually(lambda: server.stats.demand.streams < STREAMS_PER_LEASE_MAX)
        assert await client.fetch((0, 1, 1)) == [PAGES[1]]


async def test_a_slow_reader_makes_the_server_hold_little():
    """It asks for 4 GiB and reads nothing: the server stops after what flow control lets through."""
    region = SyntheticRegion(1, 0, 64 << 30)
    async with serving(regions=[region]) as server, connected(server.port) as client:
        await client.open()
        stream = client.stream("Background")
        for number in range(256):
            await stream.write(request(number, (0, number * 4096, 4096)))
        stats = server.stats.background
        await eventually(lambda: stats.requests == 256)
        seen = -1
        while seen != stats.bytes:  # until it stands still
            seen = stats.bytes
            await asyncio.sleep(0.2)
        assert seen < 64 << 20
        stream.cancel()


async def test_synthetic_memory():
    region = SyntheticRegion(7, 0, 64 << 30)
    async with serving(regions=[region]) as server, connected(server.port) as client:
        opened = await client.open()
        assert opened.regions[0].size_bytes == 64 << 30
        last = (64 << 30) // PAGE - 1
        expected = [synthetic_page(7, 0, number, PAGE) for number in (*range(64), last)]
        assert await client.fetch((0, 0, 64), (0, last, 1)) == expected
        assert bytes(PAGE) in expected


async def test_digest(ram):
    async with serving(ram) as server, connected(server.port) as client:
        opened = await client.open()
        ranges = [pb.PageRange(first_page=0, page_count=200), pb.PageRange(first_page=150, page_count=10)]
        response = await client.pages.Digest(
            pb.DigestRequest(ranges=ranges), metadata=client.metadata, timeout=TIMEOUT_S
        )
        whole = b"".join(PAGES)
        halves = pages_digest(whole[: 70 * PAGE], 0, PAGE) + pages_digest(whole[70 * PAGE :], 70, PAGE)
        assert list(response.digests) == [
            halves % DIGEST_MODULUS,
            pages_digest(whole[150 * PAGE : 160 * PAGE], 150, PAGE),
        ]
        assert response.generation == opened.generation
        for bad, code in (
            (pb.PageRange(region=1, page_count=1), grpc.StatusCode.INVALID_ARGUMENT),
            (pb.PageRange(first_page=199, page_count=2), grpc.StatusCode.INVALID_ARGUMENT),
        ):
            call = client.pages.Digest(pb.DigestRequest(ranges=[bad]), metadata=client.metadata, timeout=TIMEOUT_S)
            assert (await refused(call))[0] is code
        many = pb.DigestRequest(ranges=[pb.PageRange(page_count=200)] * 400)
        call = client.pages.Digest(many, metadata=client.metadata, timeout=TIMEOUT_S)
        assert (await refused(call))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_restart_with_the_same_state_keeps_the_lease(ram, tmp_path):
    store = DirectoryStore(tmp_path / "state")
    async with serving(ram, store=store) as server, connected(server.port) as client:
        opened = await client.open(pb.LEASE_KIND_MIGRATION)
    store.close()
    assert opened.token not in (tmp_path / "state" / "leases.json").read_text()
    again = DirectoryStore(tmp_path / "state")
    async with serving(ram, store=again) as server, connected(server.port) as client:
        resumed = await client.resume(opened, opened.generation)
        assert (resumed.lease_id, resumed.generation) == (opened.lease_id, opened.generation)
        assert await client.fetch((0, 1, 1)) == [PAGES[1]]
        code, _ = await refused(client.open(resume_lease_id=opened.lease_id, resume_token="x"))
        assert code is grpc.StatusCode.PERMISSION_DENIED
    again.close()


async def test_a_restart_with_other_memory_has_another_generation(ram, tmp_path):
    store = DirectoryStore(tmp_path / "state")
    async with serving(ram, store=store) as server, connected(server.port) as client:
        opened = await client.open(pb.LEASE_KIND_MIGRATION)
    ram.write_bytes(b"".join(reversed(PAGES)))
    async with serving(ram, store=store) as server, connected(server.port) as client:
        code, _ = await refused(client.resume(opened, opened.generation))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
    store.close()


async def test_a_port_in_use_is_an_error(ram):
    async with serving(ram) as server:
        with pytest.raises(UsageError, match="cannot listen") as caught:
            async with serving(ram, port=server.port):
                pass
        assert caught.value.remedy


async def test_health_and_reflection(ram):
    async with serving(ram) as server, connected(server.port) as client:
        health = health_pb2_grpc.HealthStub(client.channel)
        for service in ("", "farfault.v1.PageService", "farfault.v1.SourceService"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflect = reflection_pb2_grpc.ServerReflectionStub(client.channel)
        call = reflect.ServerReflectionInfo(timeout=TIMEOUT_S)
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        names = {service.name for service in (await call.read()).list_services_response.service}
        assert {"farfault.v1.PageService", "farfault.v1.SourceService", "grpc.health.v1.Health"} <= names
        await call.done_writing()


# ---- express -------------------------------------------------------------------------------------


async def test_express(ram):
    async with serving(ram) as server, connected(server.port) as client:
        opened = await client.open()
        express = await Express.connect(client.lane(pb.LANE_KIND_EXPRESS))
        assert (await express.hello(opened.lease_id, opened.token)).code == 0
        express.send(request(1, (0, 1, 1)))
        batch = await express.batch()
        assert pages_of(batch) == [PAGES[1]]
        assert batch.generation == opened.generation
        express.send(*(request(number, (0, number, 1)) for number in range(2, 100)))
        assert sorted(await collect(express.batch, set(range(2, 100)))) == sorted(PAGES[2:100])
        assert server.stats.express.batches < 99
        await client.pages.Release(pb.ReleaseRequest(), metadata=client.metadata, timeout=TIMEOUT_S)
        assert await express.ended()
        await eventually(lambda: server.stats.express.streams == 0)
        express.close()


async def test_express_byte_by_byte(ram):
    async with serving(ram) as server, connected(server.port) as client:
        opened = await client.open()
        express = await Express.connect(client.lane(pb.LANE_KIND_EXPRESS))
        await express.hello(opened.lease_id, opened.token)
        message = request(1, (0, 1, 1)).SerializeToString()
        for byte in LENGTH.pack(len(message)) + message:
            express.writer.write(bytes([byte]))
            await express.writer.drain()
        assert pages_of(await express.batch()) == [PAGES[1]]
        long = request(2, *[(0, 1, 1)] * 10_000)  # about the longest
        assert REQUEST_BYTES_MAX - 10_000 < len(long.SerializeToString()) <= REQUEST_BYTES_MAX
        express.send(long)
        pages = await collect(express.batch, {2})
        assert pages.count(PAGES[1]) == 4096
        assert pages.count("REJECTED") == 10_000 - 4096
        express.send(request(3, *[(0, 1, 1)] * 20_000))
        assert await express.ended()
        express.close()


async def test_express_turns(tmp_path):
    """Zero pages cost the server time and its answers no room: others have their turn between them all the same."""
    zeros = write_ram(tmp_path / "zeros.ram", [bytes(PAGE)] * 4096)
    async with serving(zeros) as server, connected(server.port) as client:
        opened = await client.open()
        express = await Express.connect(client.lane(pb.LANE_KIND_EXPRESS))
        await express.hello(opened.lease_id, opened.token)
        stats = server.stats.express
        express.send(*(request(number, (0, 0, 4096)) for number in range(32)))
        while stats.batches == 0:  # noqa: ASYNC110 - each turn of the loop counts
            await asyncio.sleep(0)
        assert stats.batches <= 2 * BATCHES_PER_TURN_MAX
        assert len(await collect(express.batch, set(range(32)))) == 32 * 4096
        express.close()


async def test_express_refuses_like_grpc(ram):
    async with serving(ram) as server, connected(server.port) as client:
        opened = await client.open()
        cases = [
            (("", ""), {}, 16),
            ((opened.lease_id, "wrong"), {}, 7),
            (("unknown", opened.token), {}, 7),
            ((opened.lease_id, opened.token), {"protocol_version": 2}, 9),
        ]
        for arguments, options, code in cases:
            express = await Express.connect(client.lane(pb.LANE_KIND_EXPRESS))
            welcome = await express.hello(*arguments, **options)
            assert welcome.code == code
            assert "\n  remedy: " in welcome.message
            assert await express.ended()
            express.close()


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", LENGTH.pack(3) + b"\xff\xff\xff", LENGTH.pack(1 << 20)])
@pytest.mark.parametrize("greeted", [False, True])
async def test_express_nonsense_ends_the_connection(ram, garbage, greeted):
    async with serving(ram) as server, connected(server.port) as client:
        opened = await client.open()
        express = await Express.connect(client.lane(pb.LANE_KIND_EXPRESS))
        if greeted:
            await express.hello(opened.lease_id, opened.token)
        express.writer.write(garbage)
        assert await express.ended()
        express.close()
        assert await client.fetch((0, 1, 1)) == [PAGES[1]]


async def test_express_slow_reader():
    region = SyntheticRegion(1, 0, 64 << 30)
    async with serving(regions=[region]) as server, connected(server.port) as client:
        opened = await client.open()
        express = await Express.connect(client.lane(pb.LANE_KIND_EXPRESS))
        await express.hello(opened.lease_id, opened.token)
        express.writer.transport.pause_reading()
        requests = [request(number, (0, number * 4096, 4096)) for number in range(16)]
        express.send(*requests)
        stats = server.stats.express
        await eventually(lambda: stats.requests == 16)
        seen = -1
        while seen != stats.bytes:
            seen = stats.bytes
            await asyncio.sleep(0.1)
        assert seen < 32 << 20
        express.writer.transport.resume_reading()
        done = set()
        while len(done) < 16:
            done |= set((await express.batch()).done_request_ids)
        express.close()


# ---- TLS and the background process --------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    path = tmp_path_factory.mktemp("tls")
    make_certificates(path)
    return path


async def test_tls_on_every_lane(ram, certificates):
    credentials = channel_credentials(certificates / "client")
    async with (
        serving(ram, tls=certificates / "server", background_port=0) as server,
        connected(server.port, credentials) as client,
    ):
        opened = await client.open()
        assert await client.fetch((0, 1, 1)) == [PAGES[1]]
        express = await Express.connect(client.lane(pb.LANE_KIND_EXPRESS), client_ssl_context(certificates / "client"))
        assert (await express.hello(opened.lease_id, opened.token)).code == 0
        express.send(request(1, (0, 0, 200)))
        assert await collect(express.batch, {1}) == PAGES
        express.close()
        async with connected(client.lane(pb.LANE_KIND_BACKGROUND), credentials) as side:
            side.opened = opened
            assert await side.fetch((0, 0, 200), name="Background") == PAGES


async def test_background_process(ram):
    async with serving(ram, background_port=0) as server, connected(server.port) as client:
        opened = await client.open()
        port = client.lane(pb.LANE_KIND_BACKGROUND)
        async with connected(port) as side:
            side.opened = opened
            assert await side.fetch((0, 0, 200), name="Background") == PAGES
            await eventually(lambda: server.lane_stats()["background"].pages_data == 160)
            code, _ = await refused(side.stream("Background", ()).read())
            assert code is grpc.StatusCode.UNAUTHENTICATED
            code, _ = await refused(side.stream("Demand").read())
            assert code is grpc.StatusCode.UNIMPLEMENTED


async def test_bulk_without_grpc_comes_from_the_background_process(ram):
    async with serving(ram, background_port=0, express_background_port=0) as server, connected(server.port) as client:
        opened = await client.open()
        express = await Express.connect(client.lane(pb.LANE_KIND_EXPRESS_BACKGROUND))
        assert (await express.hello(opened.lease_id, opened.token)).code == 0
        express.send(request(1, (0, 0, len(PAGES))))
        assert await collect(express.batch, {1}) == PAGES
        await client.pages.Release(pb.ReleaseRequest(), metadata=client.metadata, timeout=TIMEOUT_S)
        assert await express.ended(), "its lease is gone"
        express.close()
        refused_one = await Express.connect(client.lane(pb.LANE_KIND_EXPRESS_BACKGROUND))
        assert (await refused_one.hello(opened.lease_id, opened.token)).code != 0
        refused_one.close()


async def test_background_process_that_dies_is_started_again(ram):
    async with serving(ram, background_port=0) as server, connected(server.port) as client:
        opened = await client.open()
        port = client.lane(pb.LANE_KIND_BACKGROUND)
        assert server.background is not None
        pid = server.background.pid
        assert pid is not None
        os.kill(pid, 9)
        await eventually(lambda: not server.background.is_up or server.background.pid != pid)
        assert await client.fetch((0, 0, 200), name="Background") == PAGES  # meanwhile: the main port
        await eventually(lambda: server.background.is_up and server.background.pid != pid)
        assert (await client.resume(opened)).lanes
        assert client.lane(pb.LANE_KIND_BACKGROUND) == port
        async with connected(port) as side:
            side.opened = opened
            assert await side.fetch((0, 1, 1), name="Background") == [PAGES[1]]


async def test_background_process_that_hangs_is_replaced(ram, monkeypatch):
    """It would serve under an old record: nobody waits for it for long."""
    monkeypatch.setattr(process_module, "ACKNOWLEDGE_TIMEOUT_S", 0.3)
    async with serving(ram, background_port=0) as server, connected(server.port) as client:
        assert server.background is not None
        pid = server.background.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await client.open()
        await eventually(lambda: server.background.is_up and server.background.pid != pid)


async def test_background_process_that_always_dies_is_given_up(ram, monkeypatch):
    monkeypatch.setattr(process_module, "RESTARTS_MAX", 1)
    async with serving(ram, background_port=0) as server, connected(server.port) as client:
        assert server.background is not None
        seen = set()
        while len(seen) < 2:
            await eventually(lambda: server.background.is_up and server.background.pid not in seen)
            seen.add(server.background.pid)
            os.kill(server.background.pid, signal.SIGKILL)
        await eventually(lambda: server.background.is_given_up)
        opened = await client.open()
        assert {lane.kind for lane in opened.lanes} == {pb.LANE_KIND_EXPRESS}
        assert await client.fetch((0, 0, 200), name="Background") == PAGES


async def test_background_port_in_use_is_an_error(ram, monkeypatch):
    monkeypatch.setattr(process_module, "START_PAUSE_S", 0.01)
    monkeypatch.setattr(process_module, "START_ATTEMPTS_MAX", 2)
    async with serving(ram) as server:
        with pytest.raises(FarfaultError, match="background process: cannot listen"):
            async with serving(ram, background_port=server.port):
                pass


async def test_background_process_ends_a_released_lease(ram):
    async with serving(ram, background_port=0) as server, connected(server.port) as client:
        opened = await client.open()
        async with connected(client.lane(pb.LANE_KIND_BACKGROUND)) as side:
            side.opened = opened
            stream = side.stream("Background")
            await stream.write(request(1, (0, 1, 1)))
            await collect(stream.read, {1})
            await client.pages.Release(pb.ReleaseRequest(), metadata=client.metadata, timeout=TIMEOUT_S)
            assert await asyncio.wait_for(stream.read(), TIMEOUT_S) is grpc.aio.EOF
