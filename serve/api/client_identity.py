"""Who a request comes from: its API key, or the address behind trusted proxies."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from aiohttp import web

from serve.api.settings import API
from serve.config.http import IPNetwork

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_IPV6_PREFIX = 64  # the part of an address that a provider gives to one customer
_FORWARDED_FOR = re.compile(r'(?:^|;)\s*for="?([^;"]*)"?', re.IGNORECASE)


def client_of(http: web.Request) -> str:
    """Return a name for the client of a request, to share the server between clients.

    It is ``key:`` and a hash of the API key, if the request carries a valid one. Otherwise it is
    the client's address, or ``unknown`` where there is none, as on a Unix socket.
    """
    settings = http.app[API].settings
    key = valid_key(http.headers, settings.api_keys)
    if key is not None:
        return _name_of_key(key)
    return client_address(http.headers, http.remote, settings.http.trusted_proxies)


def valid_key(headers: Mapping[str, str], keys: Sequence[str]) -> str | None:
    """Return the key of ``keys`` that ``Authorization`` names, or None.

    The scheme is followed by one space or more (RFC 9110, section 11.4).
    """
    scheme, _, token = headers.get("Authorization", "").strip(" \t").partition(" ")
    if scheme.lower() != "bearer":
        return None
    sent = token.strip(" \t").encode("utf-8", "surrogateescape")
    # All keys are compared, so that the time says nothing about them.
    found = [key for key in keys if hmac.compare_digest(sent, key.encode())]
    return found[0] if found else None


def client_address(
    headers: Mapping[str, str], peer: str | None, trusted: Sequence[IPNetwork]
) -> str:
    """Return the bucket of the address behind trusted proxies: the last one that is not trusted.

    Each proxy appends the address that it was called from. So the list counts only as far as the
    proxies that wrote it are trusted; what a client has put before is ignored.
    """
    address = parse_address(peer)
    if address is None:
        return "unknown"
    if not is_trusted(address, trusted):
        return bucket_of(address)
    for name in reversed(_forwarded(headers)):
        found = parse_address(name)
        if found is None:
            break
        address = found
        if not is_trusted(address, trusted):
            break
    return bucket_of(address)


def bucket_of(address: IPAddress) -> str:
    """Return the addresses that count as one client: one of IPv4, a /64 network of IPv6."""
    if address.version == 4:
        return str(address)
    return str(ipaddress.IPv6Network((int(address), _IPV6_PREFIX), strict=False))


def is_trusted(address: IPAddress, trusted: Sequence[IPNetwork]) -> bool:
    """Return whether ``address`` is a trusted proxy's."""
    return any(address in network for network in trusted)


@lru_cache(maxsize=4096)
def parse_address(text: str | None) -> IPAddress | None:
    """Read an address that may have a port, or brackets (``[2001:db8::1]:4711``)."""
    text = (text or "").strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _forwarded(headers: Mapping[str, str]) -> list[str]:
    """Return the addresses that proxies have noted, the farthest first.

    ``X-Forwarded-For`` counts where there are both headers, because a proxy that writes one of
    them passes the client's other one on.
    """
    lines = list(_all_values(headers, "X-Forwarded-For"))
    if lines:
        return [name for line in lines for name in line.split(",")]
    hops = [hop for line in _all_values(headers, "Forwarded") for hop in line.split(",")]
    found = [_FORWARDED_FOR.search(hop) for hop in hops]
    return [match[1] if match else "" for match in found]


def _all_values(headers: Mapping[str, str], name: str) -> Iterator[str]:
    getall = getattr(headers, "getall", None)  # repeated headers are one list
    if getall is not None:
        yield from getall(name, ())
    elif name in headers:
        yield headers[name]


@lru_cache(maxsize=64)
def _name_of_key(key: str) -> str:
    return "key:" + hashlib.sha256(key.encode()).hexdigest()[:16]
