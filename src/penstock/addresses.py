"""Which addresses may be named, and which lie within a network of one's own. Pure.

A webhook is not sent there unless its settings allow it: whoever may choose its URL could else
reach what only this machine can reach.
"""

import re
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

_NAT64 = IPv6Network("64:ff9b::/96")


def read_base_url(value: object) -> str:
    """The URL below which an API lies, without a slash at its end.

    Raises:
        ValueError: It is none, or has more than a scheme, a host and a path.
    """
    if not isinstance(value, str):
        raise ValueError
    try:
        parts = urlsplit(value)
        _ = parts.port  # which raises if it is not a number up to 65535
    except ValueError:
        raise ValueError from None
    is_plain = not (parts.query or parts.fragment or re.search(r"\s", value))
    if parts.scheme not in ("http", "https") or not parts.hostname or not is_plain:
        raise ValueError
    return value.rstrip("/")


def is_private(address: str) -> bool:
    """Whether an address is not one of the public Internet: private, shared, loopback,
    link-local, multicast, reserved or unspecified, IPv4 or IPv6, or an IPv6 form of such an
    IPv4 address. What is no address counts as private."""
    try:
        found = ip_address(address)
    except ValueError:
        return True
    if isinstance(found, IPv6Address):
        if (inner := _inner(found)) is not None:
            return _is_private(inner)
        return _is_private(found) or found.is_site_local
    return _is_private(found)


def is_private_host(host: str) -> bool:
    """Whether the host of a URL, in its normal form, is a private address or `localhost`.

    Of another name nothing is known before it is resolved.
    """
    host = host.strip("[]").rstrip(".").lower()
    try:
        ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return is_private(host)


def _is_private(address: IPv4Address | IPv6Address) -> bool:
    return (
        not address.is_global
        or address.is_private
        or address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_reserved
        or address.is_unspecified
    )


def _inner(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that an IPv6 address stands for; None if it stands for itself."""
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour
