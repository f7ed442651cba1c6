"""``farfault certs``: a certificate authority and certificates for a trial."""

from __future__ import annotations

import datetime
import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from farfault_cli.errors import UsageError
from farfault_cli.tls import CA_NAME, CERTIFICATE_NAME, KEY_NAME

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

VALID_DAYS: Final = 30
CLOCK_SKEW: Final = datetime.timedelta(hours=1)
ALWAYS_HOSTS: Final = ("localhost", "127.0.0.1", "::1")


@click.command(short_help="Make certificates for a trial.")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--host", "hosts", multiple=True, metavar="NAME", help="Name or address of the server; repeatable.")
@click.option("--days", type=click.IntRange(1, 365), default=VALID_DAYS, show_default=True, help="How long they hold.")
def certs(directory: Path, hosts: tuple[str, ...], days: int) -> None:
    """Make a certificate authority and certificates for a trial.

    Writes DIRECTORY/server and DIRECTORY/client, each with cert.pem, key.pem and ca.pem. Copy the second to the
    destination host. The key of the authority is thrown away: to add a host, make all of them anew.

    \b
        farfault certs /etc/farfault/tls --host source.example --host 192.0.2.7
        farfault serve --listen 0.0.0.0:7777 --tls /etc/farfault/tls/server ...
        farfault receive --source source.example:7777 --tls /etc/farfault/tls/client ...
    """
    make_certificates(directory, hosts, days=days)
    click.echo(f"server: {directory / 'server'}\nclient: {directory / 'client'}\nvalid for {days} days")


def make_certificates(directory: Path, hosts: tuple[str, ...] = (), *, days: int = VALID_DAYS) -> None:
    """Writes ``server/`` and ``client/`` below a directory.

    Args:
        directory: made where it does not exist.
        hosts: names and addresses of the server, besides those of this host's loopback.
        days: how long the certificates hold.

    Raises:
        UsageError: the directory cannot be written.
    """
    from cryptography.hazmat.primitives.asymmetric import ec

    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _certificate("farfault trial authority", authority_key, days)
    try:
        for role, role_hosts in (("server", (*ALWAYS_HOSTS, *hosts)), ("client", ())):
            key = ec.generate_private_key(ec.SECP256R1())
            certificate = _certificate(
                f"farfault {role}", key, days, issuer=(authority, authority_key), hosts=role_hosts
            )
            _write_role(directory / role, authority, certificate, key)
    except OSError as error:
        raise UsageError(
            f"cannot write {directory}: {error.strerror}", "name a directory that you may write"
        ) from error


def _certificate(
    name: str,
    key: EllipticCurvePrivateKey,
    days: int,
    *,
    issuer: tuple[x509.Certificate, EllipticCurvePrivateKey] | None = None,
    hosts: tuple[str, ...] = (),
) -> x509.Certificate:
    """A certificate; without an issuer that of an authority, which signs itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import NameOID

    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    issuer_key = issuer[1] if issuer else key
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if hosts:
        names = dict.fromkeys(hosts)
        builder = builder.add_extension(x509.SubjectAlternativeName([_alternative(host) for host in names]), False)
    return builder.sign(issuer_key, hashes.SHA256())


def _alternative(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_role(
    directory: Path, authority: x509.Certificate, certificate: x509.Certificate, key: EllipticCurvePrivateKey
) -> None:
    from cryptography.hazmat.primitives import serialization

    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write(directory / KEY_NAME, private, mode=0o600)
    _write(directory / CERTIFICATE_NAME, certificate.public_bytes(pem), mode=0o644)
    _write(directory / CA_NAME, authority.public_bytes(pem), mode=0o644)


def _write(path: Path, content: bytes, mode: int) -> None:
    """The file is replaced whole, and never readable for more than `mode` says."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    temporary.replace(path)
