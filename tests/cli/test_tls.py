"""Certificates of `farfault certs`, and TLS from a directory, on both sides."""

import asyncio
import ssl
from pathlib import Path

import grpc.aio
import pytest
from click.testing import CliRunner
from farfault_cli.certs import certs, make_certificates
from farfault_cli.errors import UsageError
from farfault_cli.tls import ServerTls, channel_credentials, client_ssl_context, server_ssl_context


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tls")
    make_certificates(path, ("source.example", "192.0.2.7"))
    return path


async def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> bytes:
    """One connection over loopback; what the server says, where it lets the client in."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    listening = await asyncio.start_server(greet, "127.0.0.1", 0, ssl=server)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client, server_hostname=name)
        try:
            return await reader.read()
        finally:
            writer.close()


async def lets_in(server: ssl.SSLContext, client: ssl.SSLContext) -> bool:
    """With TLS 1.3 a client learns that it is refused with its first read."""
    try:
        return await handshake(server, client, "localhost") == b"hello"
    except (ssl.SSLError, ConnectionError):
        return False


@pytest.mark.parametrize("name", ["source.example", "192.0.2.7", "localhost", "127.0.0.1"])
async def test_both_sides_trust_each_other(directory, name):
    server, client = server_ssl_context(directory / "server"), client_ssl_context(directory / "client")
    assert await handshake(server, client, name) == b"hello"


async def test_another_name_is_refused(directory):
    server, client = server_ssl_context(directory / "server"), client_ssl_context(directory / "client")
    with pytest.raises(ssl.SSLCertVerificationError):
        await handshake(server, client, "other.example")


async def test_a_stranger_is_not_let_in(directory, tmp_path):
    make_certificates(tmp_path)
    (tmp_path / "client" / "ca.pem").write_bytes((directory / "client" / "ca.pem").read_bytes())
    server, client = server_ssl_context(directory / "server"), client_ssl_context(tmp_path / "client")
    assert not await lets_in(server, client)


async def test_a_client_without_certificate_is_not_let_in(directory, tmp_path):
    (tmp_path / "ca.pem").write_bytes((directory / "client" / "ca.pem").read_bytes())
    assert not await lets_in(server_ssl_context(directory / "server"), client_ssl_context(tmp_path))


def test_keys_are_private(directory):
    for role in ("server", "client"):
        assert (directory / role).stat().st_mode & 0o777 == 0o700
        assert (directory / role / "key.pem").stat().st_mode & 0o777 == 0o600


def test_command(tmp_path):
    result = CliRunner().invoke(certs, [str(tmp_path / "new" / "tls"), "--host", "a.example"])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "new" / "tls" / "client").iterdir()) == [
        "ca.pem",
        "cert.pem",
        "key.pem",
    ]


def test_a_place_that_cannot_be_written_has_a_remedy(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write") as caught:
        make_certificates(tmp_path / "file")
    assert caught.value.remedy


@pytest.mark.parametrize("load", [channel_credentials, client_ssl_context, server_ssl_context, ServerTls])
@pytest.mark.parametrize("missing", ["directory", "cert.pem", "key.pem"])
def test_missing_files_have_a_remedy(directory, tmp_path, load, missing):
    path = tmp_path / "copy"
    if missing != "directory":
        path.mkdir()
        for source in (directory / "server").iterdir():
            if source.name != missing:
                (path / source.name).write_bytes(source.read_bytes())
    with pytest.raises(UsageError) as caught:
        load(path)
    assert "farfault certs" in caught.value.remedy


def test_a_key_of_another_certificate(directory, tmp_path):
    make_certificates(tmp_path)
    (tmp_path / "server" / "key.pem").write_bytes((directory / "server" / "key.pem").read_bytes())
    with pytest.raises(UsageError, match="not usable"):
        server_ssl_context(tmp_path / "server")


class Servers:
    """A gRPC server and a plain one under one identity; `answers` says which lets a client in."""

    def __init__(self, directory: Path) -> None:
        self.tls = ServerTls(directory)
        self.grpc = grpc.aio.server()
        self.port = self.grpc.add_secure_port("127.0.0.1:0", self.tls.grpc_credentials())

    async def grpc_lets_in(self, directory: Path) -> bool:
        async with grpc.aio.secure_channel(f"127.0.0.1:{self.port}", channel_credentials(directory)) as channel:
            try:
                await channel.unary_unary("/no/such")(b"", timeout=5)
            except grpc.aio.AioRpcError as error:
                return error.code() is grpc.StatusCode.UNIMPLEMENTED
            return False

    async def plain_lets_in(self, directory: Path) -> bool:
        self.tls.refresh()
        return await lets_in(self.tls.ssl_context, client_ssl_context(directory))


async def test_a_renewed_certificate_needs_no_restart(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    make_certificates(old)
    make_certificates(new)
    served = tmp_path / "served"
    served.mkdir()
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (served / name).write_bytes((old / "server" / name).read_bytes())
    servers = Servers(served)
    await servers.grpc.start()
    try:
        assert await servers.grpc_lets_in(old / "client")
        assert await servers.plain_lets_in(old / "client")
        assert not await servers.grpc_lets_in(new / "client")

        (served / "cert.pem").write_bytes(b"half a certificate")  # being written: the old one goes on
        assert await servers.grpc_lets_in(old / "client")
        assert await servers.plain_lets_in(old / "client")

        for name in ("ca.pem", "cert.pem", "key.pem"):
            (served / name).write_bytes((new / "server" / name).read_bytes())
        assert await servers.grpc_lets_in(new / "client")
        assert await servers.plain_lets_in(new / "client")
        assert not await servers.grpc_lets_in(old / "client")
    finally:
        await servers.grpc.stop(None)
