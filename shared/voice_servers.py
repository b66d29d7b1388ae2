"""Where voice credentials may go, and where a voice server may have sound sent.

Credentials are given by jobs, addresses by servers: neither is believed beyond what the operator allows, so that no
token leaves for a stranger and no packet for a machine inside.

Source: design section 4.1, `_VOICE_HOSTS` and `_VOICE_NETWORKS`.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

VOICE_HOSTS = "discord.media,discord.gg"
"""Discord's own domains."""
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DOMAIN = rf"{_LABEL}(?:\.{_LABEL})*"
_PORT = r"[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
ENDPOINT_PATTERN = rf"^(?=.{{1,255}}$)({_DOMAIN}|\[[0-9A-Fa-f:.]{{2,45}}\])(?::({_PORT}))?$(?!\n)"

Network = IPv4Network | IPv6Network


def parse_hosts(value: str) -> tuple[tuple[str, ...], tuple[Network, ...]]:
    """Domains and networks of a list with commas.

    Raises: ValueError saying what is allowed.
    """
    domains: list[str] = []
    networks: list[Network] = []
    for word in value.split(","):
        one = word.strip().lower()
        if re.fullmatch(r"[0-9.]+(/[0-9]+)?|[0-9a-f:.]*:[0-9a-f:.]*(/[0-9]+)?", one):
            networks.append(_network(one))
        elif re.fullmatch(_DOMAIN, one):
            domains.append(one)
        else:
            raise ValueError(f"allowed: domains and networks with commas between them, such as {VOICE_HOSTS}")
    return tuple(domains), tuple(networks)


def parse_networks(value: str) -> tuple[IPv4Network, ...]:
    """IPv4 networks of a list with commas, which may be empty.

    Raises: ValueError saying what is allowed.
    """
    networks = [_network(word.strip()) for word in value.split(",") if word.strip()]
    found = tuple(one for one in networks if isinstance(one, IPv4Network))
    if len(found) < len(networks):
        raise ValueError("allowed: IPv4 networks, voice servers have no other addresses")
    return found


def _network(word: str) -> Network:
    try:
        return ip_network(word)
    except ValueError as error:
        raise ValueError(f"{error}, allowed: networks such as 10.0.0.0/8 or 127.0.0.1") from None


class VoiceServers:
    """What the operator allows.

    Args:
        hosts: see `parse_hosts`.
        networks: see `parse_networks`.
    """

    def __init__(self, hosts: str = VOICE_HOSTS, networks: str = "") -> None:
        self._allowed = hosts
        self._domains, self._host_networks = parse_hosts(hosts)
        self._networks = parse_networks(networks)

    def refusal_of_endpoint(self, endpoint: str) -> str:
        """Why credentials must not go there; empty where they may."""
        found = re.match(ENDPOINT_PATTERN, endpoint)
        if found is None:
            return "no host, or host:port with a port of 1 to 65535"
        host = found[1].lower()
        if self._is_allowed(host):
            return ""
        return f"{host} is no voice server that GUILDCAST_VOICE_HOSTS allows ({self._allowed})"

    def _is_allowed(self, host: str) -> bool:
        try:
            address = ip_address(host.strip("[]"))
        except ValueError:
            return any(host == domain or host.endswith(f".{domain}") for domain in self._domains)
        return _within(address, self._host_networks)

    def refusal_of_address(self, address: str) -> str:
        """Why no sound must go there; empty where it may.

        Args:
            address: an IPv4 literal.
        """
        where = IPv4Address(address)
        if _within(where, self._networks) or (where.is_global and not where.is_multicast):
            return ""
        return f"{address} is no public address, nor within GUILDCAST_VOICE_NETWORKS"


def _within(address: IPv4Address | IPv6Address, networks: tuple[Network, ...]) -> bool:
    return any(address in network for network in networks if network.version == address.version)
