"""Masking of personal data: e-mail addresses and public IPv4 addresses, as FineWeb (Penedo et al. 2024) does it.

Regular expressions, each part of bounded length, so that the time grows linearly with any text. They find what looks
like an address: a version number of four parts is masked, too.
"""

import ipaddress
import re

from megagpt.corpus.normalization import map_lines

EMAIL, IP = "<email>", "<ip>"
"""What stands in for an address."""

_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"  # of a host's name, RFC 1035
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}"  # the RFC allows stranger names, which nobody has
    rf"@(?:{_LABEL}\.){{1,8}}[A-Za-z]{{2,24}}(?![A-Za-z0-9])"
)
_IP = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}")
_BEFORE_IP, _AFTER_IP = re.compile(r"[0-9.]"), re.compile(r"\.?[0-9]")  # what makes it part of something else
# Those of the IANA registry of special-purpose addresses that belong to nobody, and multicast and reserved ones; not
# ipaddress's is_global, which differs between versions of Python.
_NOT_PUBLIC = [
    ipaddress.IPv4Network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
        "224.0.0.0/3",
    )
]


def mask_emails(text: str) -> str:
    """The text with EMAIL for every e-mail address."""
    if "@" not in text:
        return text
    return map_lines(lambda lines: [_EMAIL.sub(EMAIL, line) if "@" in line else line for line in lines], text)


def mask_ips(text: str) -> str:
    """The text with IP for every public IPv4 address."""
    return _IP.sub(_masked_ip, text)


def _masked_ip(match: re.Match[str]) -> str:
    text, start, end = match.string, match.start(), match.end()
    is_part = (start > 0 and _BEFORE_IP.match(text, start - 1)) or _AFTER_IP.match(text, end)
    return match[0] if is_part or not _is_public(match[0]) else IP


def _is_public(address: str) -> bool:
    try:
        value = ipaddress.IPv4Address(address)
    except ipaddress.AddressValueError:  # a part above 255, or with a leading zero
        return False
    return not any(value in network for network in _NOT_PUBLIC)
