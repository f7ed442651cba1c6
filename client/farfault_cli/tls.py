"""TLS for both sides, from a directory of PEM files.

==========  =========================================================================================
ca.pem      whom we trust. Needed by a client. With it a server wants a certificate from every client.
cert.pem    our own certificate. Needed by a server; a client shows it where it has one.
key.pem     the key of cert.pem
==========  =========================================================================================

``farfault certs`` makes such directories for a trial.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final, NamedTuple

import grpc

from farfault_cli.errors import UsageError

CA_NAME: Final = "ca.pem"
CERTIFICATE_NAME: Final = "cert.pem"
KEY_NAME: Final = "key.pem"

REMEDY: Final = (
    "the directory needs cert.pem, key.pem and ca.pem; `farfault certs DIR --host NAME` makes them for a trial"
)

Stamp = tuple[int, ...]


class PemFiles(NamedTuple):
    """The files' contents; None: there is no such file."""

    ca: bytes | None
    certificate: bytes | None
    key: bytes | None


def read_pem_files(directory: Path) -> PemFiles:
    """Reads all that is there.

    Raises:
        UsageError: no directory, or a file in it cannot be read.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory", REMEDY)
    return PemFiles(*(_read(directory / name) for name in (CA_NAME, CERTIFICATE_NAME, KEY_NAME)))


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "run as the user that owns it") from error


def channel_credentials(directory: Path) -> grpc.ChannelCredentials:
    """What a gRPC client needs.

    Raises:
        UsageError: a file is missing or cannot be read.
    """
    files = read_pem_files(directory)
    if files.ca is None:
        raise UsageError(f"there is no {directory / CA_NAME}", REMEDY)
    if (files.certificate is None) != (files.key is None):
        raise UsageError(f"{directory} has one of {CERTIFICATE_NAME} and {KEY_NAME}, but not both", REMEDY)
    return grpc.ssl_channel_credentials(files.ca, files.key, files.certificate)


def client_ssl_context(directory: Path) -> ssl.SSLContext:
    """The same for a plain stream; the server's name is checked.

    Raises:
        UsageError: as `channel_credentials`, or a file is not what its name says.
    """
    channel_credentials(directory)
    context = ssl.create_default_context(cafile=str(directory / CA_NAME))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if (directory / CERTIFICATE_NAME).exists():
        _load_certificate(context, directory)
    return context


def server_ssl_context(directory: Path) -> ssl.SSLContext:
    """What a plain TLS server needs.

    Raises:
        UsageError: a file is missing, cannot be read, or is not what its name says.
    """
    files = _server_files(directory)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_certificate(context, directory)
    if files.ca is not None:
        context.load_verify_locations(cafile=str(directory / CA_NAME))
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _server_files(directory: Path) -> PemFiles:
    files = read_pem_files(directory)
    if files.certificate is None or files.key is None:
        raise UsageError(f"{directory} lacks {CERTIFICATE_NAME} or {KEY_NAME}", REMEDY)
    return files


def _load_certificate(context: ssl.SSLContext, directory: Path) -> None:
    try:
        context.load_cert_chain(directory / CERTIFICATE_NAME, directory / KEY_NAME)
    except (ssl.SSLError, OSError) as error:
        raise UsageError(
            f"the certificate or key in {directory} is not usable: {error}", "check that key.pem belongs to cert.pem"
        ) from error


class ServerTls:
    """The TLS identity of a server, which follows its files: a renewed certificate needs no restart.

    A new connection gets the certificate that is in the directory then. Files that are broken, for instance because
    they are being written, are left alone until they are whole. A new ca.pem counts at once for gRPC; a plain stream
    also goes on trusting the old one until the server is started again.

    Args:
        directory: of the PEM files.

    Raises:
        UsageError: a file is missing, cannot be read, or is not what its name says.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stamp = self._now()
        self._ssl_stamp = self._stamp
        self.ssl_context = server_ssl_context(directory)
        """For plain streams; call `refresh` before a connection is accepted, or now and then."""

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For a gRPC server."""
        files = _server_files(self._directory)
        return grpc.dynamic_ssl_server_credentials(
            _configuration(files),
            self._fetch,  # type: ignore[arg-type]  # None is allowed: the certificate is as before
            require_client_authentication=files.ca is not None,
        )

    def refresh(self) -> None:
        """Takes a changed certificate up for plain streams."""
        stamp = self._now()
        if stamp != self._ssl_stamp and self._is_usable():
            self._ssl_stamp = stamp
            _load_certificate(self.ssl_context, self._directory)
            if (self._directory / CA_NAME).exists():
                self.ssl_context.load_verify_locations(cafile=str(self._directory / CA_NAME))

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """gRPC asks for each new connection; None: as before."""
        stamp = self._now()
        if stamp == self._stamp or not self._is_usable():
            return None
        self._stamp = stamp
        return _configuration(_server_files(self._directory))

    def _is_usable(self) -> bool:
        try:
            server_ssl_context(self._directory)
        except UsageError:
            return False
        return True

    def _now(self) -> Stamp:
        """Changes whenever a file does."""
        stamp: list[int] = []
        for name in (CA_NAME, CERTIFICATE_NAME, KEY_NAME):
            try:
                status = (self._directory / name).stat()
            except OSError:
                stamp += (0, 0)
            else:
                stamp += (status.st_mtime_ns, status.st_ino)
        return tuple(stamp)


def _configuration(files: PemFiles) -> grpc.ServerCertificateConfiguration:
    assert files.certificate is not None
    assert files.key is not None
    return grpc.ssl_server_certificate_configuration([(files.key, files.certificate)], files.ca)
