"""Which URLs and addresses of strangers are connected to: https, public, nothing that leads back to us.

For images that are fetched and webhooks that are delivered. Whatever way an address is written (decimal, octal,
hexadecimal, IPv6 that carries IPv4), the resolver has made it an address by the time it is judged here; and it is that
address, not the name, which is connected to.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from kit import errors

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

HTTPS_PORT = 443
_SIDE_DOORS = tuple(
    ipaddress.ip_network(network)
    for network in (
        "64:ff9b::/96",  # NAT64: an IPv4 address behind a translator
        "64:ff9b:1::/48",
        "2001::/32",  # Teredo
        "2002::/16",  # 6to4
        "192.88.99.0/24",  # 6to4 relays
        "::/96",  # IPv4-compatible
        "fec0::/10",  # site-local of old
    )
)


@dataclass(frozen=True, slots=True)
class Target:
    """What a URL asks for, and of whom."""

    host: str
    port: int
    path: str
    tls: bool = True


def target(url: str, *, plain: bool = False) -> Target:
    """The parts of an https URL; with `plain` also of an http one. Raises InvalidArgument/URL_NOT_ALLOWED."""
    try:
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        port = parts.port or (HTTPS_PORT if tls else 80)
        host = (parts.hostname or "").rstrip(".").encode("idna").decode()
    except (ValueError, UnicodeError):
        raise not_allowed("it is not a URL") from None
    if not tls and not (plain and parts.scheme == "http"):
        raise not_allowed("only https URLs are used")
    if parts.username is not None or parts.password is not None:
        raise not_allowed("it carries a user name or password")
    if not host:
        raise not_allowed("it names no host")
    path = parts.path or "/"
    whole = f"{path}?{parts.query}" if parts.query else path
    if any(character <= " " or character > "~" for character in whole):
        raise not_allowed("its path has characters that must be percent-encoded")
    return Target(host, port, whole, tls)


async def resolve(target: Target) -> list[str]:
    """All addresses of a host, once: what is judged is what is connected to. Raises OSError: it has none."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            target.host, target.port, type=socket.SOCK_STREAM
        )
    except UnicodeError as error:
        raise OSError("not a host name") from error
    return [str(item[4][0]) for item in found]


def check(found: Sequence[str], port: int, trusted: Sequence[Network], *, tls: bool = True) -> str:
    """The address to connect to, of those that a name has. Raises InvalidArgument/URL_NOT_ALLOWED.

    One bad address refuses them all: a name that means a public and a private one means mischief.
    """
    addresses = [_plain(ipaddress.ip_address(text.partition("%")[0])) for text in found]
    if not addresses:
        raise not_allowed("its host has no address")
    for address in addresses:
        inside = any(
            address in network for network in trusted if network.version == address.version
        )
        if inside:
            continue
        if not _public(address):
            raise not_allowed("its host's address is not public")
        if not tls:
            raise not_allowed("only https URLs are used")
        if port != HTTPS_PORT:
            raise not_allowed(f"only port {HTTPS_PORT} is used")
    return str(addresses[0])


def networks(text: str) -> tuple[Network, ...]:
    """Networks from a comma-separated list. Raises ValueError for one that is none."""
    return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())


def not_allowed(why: str) -> errors.InvalidArgument:
    """What the caller is told; never which address it was."""
    return errors.InvalidArgument(
        "URL_NOT_ALLOWED",
        f"this URL is not used: {why}; give a public https URL",
        violations=[("url", why)],
    )


def _plain(address: Address) -> Address:
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _public(address: Address) -> bool:
    if any(address in network for network in _SIDE_DOORS if network.version == address.version):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved
