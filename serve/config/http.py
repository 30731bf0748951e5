"""The limits of HTTP: bodies, connections and their deadlines, and proxies that are trusted."""

from __future__ import annotations

import argparse
import ipaddress
import re
from dataclasses import dataclass, fields

from serve.config.option_types import COUNT, PERIOD, num_bytes, number

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

# The default of --max-body-bytes. A token is 7 bytes of JSON as an id and seldom 8 as text, so a
# body of 64 bytes a token holds the longest prompt several times over.
BODY_BYTES_PER_TOKEN = 64
MIN_BODY_BYTES, MAX_BODY_BYTES = 4 << 20, 32 << 20

_BYTES_BUDGET = 64 << 20
_HEADER_BYTES = 8190


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Limits on bodies, headers, connections and waits. Each field is the option of its name."""

    max_body_bytes: int | None = None  # None: follows from the context
    max_body_bytes_in_work: int = _BYTES_BUDGET
    max_field_values: int = 1 << 17  # a chat of 10,000 messages has 50,000; they take 20 ms
    max_header_bytes: int = _HEADER_BYTES  # of the request line and of each header
    header_timeout_s: float = 30.0
    body_timeout_s: float = 30.0  # between two pieces of a body
    write_timeout_s: float = 60.0  # in which a client must have read something
    keep_alive_timeout_s: float = 120.0
    max_connections: int = 16384
    max_connections_per_address: int = 4096
    trusted_proxies: tuple[IPNetwork, ...] = ()
    allowed_origins: tuple[str, ...] = ()

    @property
    def all_header_bytes(self) -> int:
        """The most bytes of all headers of a request."""
        return 8 * self.max_header_bytes

    def body_bytes(self, max_model_len: int) -> int:
        """Return the most bytes of a body, with contexts of ``max_model_len`` tokens."""
        if self.max_body_bytes is not None:
            return self.max_body_bytes
        wanted = BODY_BYTES_PER_TOKEN * max_model_len
        return min(max(wanted, MIN_BODY_BYTES), MAX_BODY_BYTES)


def http_limits(args: argparse.Namespace) -> HttpLimits:
    """Return the limits that the parsed options give."""
    values = {field.name: getattr(args, field.name) for field in fields(HttpLimits)}
    for name in ("trusted_proxies", "allowed_origins"):
        values[name] = tuple(values[name] or ())
    return HttpLimits(**values)


def add_http_limits(parser: argparse.ArgumentParser) -> None:
    """Add the options to ``parser``."""
    group = parser.add_argument_group("limits of HTTP")
    _add_bodies(group)
    _add_connections(group)


def _add_bodies(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    default = HttpLimits()
    add("--max-body-bytes", type=num_bytes, metavar="BYTES",
        help="Most bytes in the body of a request, also after decompression. Larger ones are "
        f"refused with status 413. Default: {BODY_BYTES_PER_TOKEN} for each token of the context, "
        f"at least {MIN_BODY_BYTES >> 20}MiB and at most {MAX_BODY_BYTES >> 20}MiB.")  # fmt: skip
    add("--max-body-bytes-in-work", type=num_bytes, default=default.max_body_bytes_in_work,
        metavar="BYTES",
        help="Most bytes of large bodies (over 64KiB) that are read, decoded and tokenised at a "
        "time; those of one client (API key or address) take at most half. Further ones wait for "
        "their turn, the smallest first. "
        f"Default: {_BYTES_BUDGET >> 20}MiB.")  # fmt: skip
    add("--max-field-values", type=COUNT, default=default.max_field_values, metavar="VALUES",
        help="Most strings, lists, objects and other items in one field of a body that is not "
        "small, because they are decoded at a stretch. Lists of token ids do not count. More are "
        "refused with status 400. Default: %(default)s.")  # fmt: skip
    add("--max-header-bytes", type=_HEADER_SIZE, default=default.max_header_bytes,
        metavar="BYTES",
        help="Most bytes in the request line and in each header, 256 to 1048576; eight times as "
        "many in all of them. More are refused with status 431. Default: %(default)s.")  # fmt: skip
    add("--header-timeout-s", type=PERIOD, default=default.header_timeout_s, metavar="SECONDS",
        help="Longest time from the first byte of a request to the end of its headers. "
        "Default: %(default)s.")  # fmt: skip
    add("--body-timeout-s", type=PERIOD, default=default.body_timeout_s, metavar="SECONDS",
        help="Longest time in which a body may bring less than 64KiB before it is complete. The "
        "request is then refused with status 408. Default: %(default)s.")  # fmt: skip
    add("--write-timeout-s", type=PERIOD, default=default.write_timeout_s, metavar="SECONDS",
        help="Longest time in which a client may read nothing of an answer that waits for it. It "
        "is then disconnected and its request aborted. Default: %(default)s.")  # fmt: skip


def _add_connections(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    default = HttpLimits()
    add("--keep-alive-timeout-s", type=PERIOD, default=default.keep_alive_timeout_s,
        metavar="SECONDS",
        help="Longest time that a connection may be idle between two requests. A proxy's should "
        "be shorter. Default: %(default)s.")  # fmt: skip
    add("--max-connections", type=COUNT, default=default.max_connections, metavar="CONNECTIONS",
        help="Most open connections. Further ones are refused with status 503. "
        "Default: %(default)s.")  # fmt: skip
    add("--max-connections-per-address", type=COUNT, metavar="CONNECTIONS",
        default=default.max_connections_per_address,
        help="Most open connections from one IPv4 address or one /64 network of IPv6, except "
        "trusted proxies. Further ones are refused with status 429. "
        "Default: %(default)s.")  # fmt: skip
    add("--trusted-proxies", type=_network, nargs="+", action="extend", metavar="ADDRESS",
        help="Addresses or networks of proxies, as in 10.0.0.0/8. The client of a request that "
        "comes through them is read from X-Forwarded-For or Forwarded. Default: none, these "
        "headers are ignored.")  # fmt: skip
    add("--allowed-origins", type=_origin, nargs="+", action="extend", metavar="ORIGIN",
        help="Origins whose pages may call the API from a browser (CORS), as in "
        "https://chat.example.com, or * for all. Default: none.")  # fmt: skip


_HEADER_SIZE = number(int, "a number of bytes (256 to 1048576)", lambda n: 256 <= n <= 2**20)


def _network(text: str) -> IPNetwork:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an address or a network: {error}"
        ) from None


def _origin(text: str) -> str:
    if text != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/?#@]+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an origin (as in https://chat.example.com, or *)"
        )
    return text
