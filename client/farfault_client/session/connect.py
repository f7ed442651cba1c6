"""From command-line values to a `SessionConfig`."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from farfault.v1 import pages_pb2 as pb
from farfault_cli.errors import UsageError

from farfault_client.options import split_target
from farfault_client.session.lease import Peer
from farfault_client.session.session import SessionConfig


def session_config(
    target: str,
    *,
    tls: Path | None = None,
    insecure: bool = False,
    admission_token_file: Path | None = None,
    express: bool = True,
    name: str = "farfault",
    kind: pb.LeaseKind = pb.LEASE_KIND_MIGRATION,
) -> SessionConfig:
    """How to reach a page server.

    Args:
        target: ``host:port``.
        tls: folder with the certificate authority and our own certificate; None: plain TCP.
        insecure: allow plain TCP to another host.

    Raises:
        UsageError: a bad target, a missing file, or plain TCP to another host without `insecure`.
    """
    host, _ = split_target(target)
    if tls is None and not insecure and not is_loopback(host):
        raise UsageError(
            f"guest memory would travel to {host} unprotected",
            "give --tls DIR (`farfault certs` makes certificates for a trial), or --insecure on a network you trust",
        )
    credentials = None
    if tls is not None:
        from farfault_cli.tls import channel_credentials

        credentials = channel_credentials(tls)
    return SessionConfig(
        peer=Peer(target, credentials, tls),
        kind=kind,
        name=name,
        admission_token=_read_token(admission_token_file) if admission_token_file else "",
        express=express,
    )


def is_loopback(host: str) -> bool:
    """Does the name or address mean this host?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_token(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise UsageError(f"admission token {path}: {error.strerror}", "it must be a readable text file") from None
