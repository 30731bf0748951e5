"""Who a request comes from: keys, addresses, proxies."""

from __future__ import annotations

import ipaddress

import pytest
from multidict import CIMultiDict

from serve.api.client_identity import client_address, valid_key

TRUSTED = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8"))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("Bearer one", "one"),
        ("Bearer two", "two"),
        ("bearer one", "one"),
        ("BEARER  one", "one"),  # RFC 9110: one space or more
        ("Bearer   two  ", "two"),
        ("Bearer", None),
        ("Bearer three", None),
        ("Bearer one two", None),
        ("Basic one", None),
        ("one", None),
        ("", None),
        ("Bearer \udcff", None),
    ],
)
def test_valid_key(value: str, found: str | None) -> None:
    assert valid_key({"Authorization": value}, ("one", "two")) == found
    assert valid_key({}, ("one",)) is None
    assert valid_key({"Authorization": value}, ()) is None


@pytest.mark.parametrize(
    ("peer", "headers", "client"),
    [
        ("192.0.2.1", [], "192.0.2.1"),
        (None, [], "unknown"),
        ("2001:db8:1:2:3:4:5:6", [], "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.1", [], "192.0.2.1"),
        # Only the word of a trusted proxy counts.
        ("192.0.2.1", [("X-Forwarded-For", "198.51.100.7")], "192.0.2.1"),
        ("10.1.1.1", [("X-Forwarded-For", "198.51.100.7")], "198.51.100.7"),
        ("10.1.1.1", [("X-Forwarded-For", "198.51.100.7:4711")], "198.51.100.7"),
        ("fd00::1", [("X-Forwarded-For", "[2001:db8::1]:4711")], "2001:db8::/64"),
        # A client may write what it likes before the proxy's entry.
        ("10.1.1.1", [("X-Forwarded-For", "203.0.113.5, 198.51.100.7")], "198.51.100.7"),
        ("10.1.1.1", [("X-Forwarded-For", "203.0.113.5, 198.51.100.7, 10.2.2.2")], "198.51.100.7"),
        (
            "10.1.1.1",
            [("X-Forwarded-For", "203.0.113.5"), ("X-Forwarded-For", "198.51.100.7")],
            "198.51.100.7",
        ),
        ("10.1.1.1", [("X-Forwarded-For", "nonsense")], "10.1.1.1"),
        ("10.1.1.1", [("X-Forwarded-For", "203.0.113.5, unknown, 10.2.2.2")], "10.2.2.2"),
        ("10.1.1.1", [("X-Forwarded-For", "10.3.3.3")], "10.3.3.3"),
        ("10.1.1.1", [("Forwarded", "for=198.51.100.7;proto=https")], "198.51.100.7"),
        ("10.1.1.1", [("Forwarded", 'by=x; For="[2001:db8::7]:80"')], "2001:db8::/64"),
        ("10.1.1.1", [("Forwarded", "for=203.0.113.5, for=198.51.100.7")], "198.51.100.7"),
        ("10.1.1.1", [("Forwarded", "for=_hidden")], "10.1.1.1"),
    ],
)
def test_client_address(peer: str | None, headers: list[tuple[str, str]], client: str) -> None:
    assert client_address(CIMultiDict(headers), peer, TRUSTED) == client
