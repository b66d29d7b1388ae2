"""Where voice credentials may go, and where a server may have sound sent."""

from __future__ import annotations

import pytest

from shared.voice_servers import VoiceServers, parse_hosts, parse_networks


@pytest.mark.parametrize(
    "endpoint", ["discord.media", "c-fra06-1.discord.media:8443", "FRA1.Discord.GG:443", "a.b.discord.gg:2053"]
)
def test_discord_is_allowed_without_a_word(endpoint: str) -> None:
    """The domains themselves and what is below them, in whatever case."""
    assert VoiceServers().refusal_of_endpoint(endpoint) == ""


@pytest.mark.parametrize(
    "endpoint",
    [
        *("evil.example:443", "discord.media.evil.example", "notdiscord.media", "discord.media.:443", "localhost:443"),
        *("127.0.0.1:443", "162.159.128.1:443", "[::1]:443", "2130706433", "evil.example/@discord.media", ""),
        *("discord.media@evil.example", "discord.media:443/x", "discord.media:0", "discord.media\n"),
    ],
)
def test_nobody_else_is(endpoint: str) -> None:
    """Neither names that look alike nor addresses: a token that went there would be somebody's."""
    assert VoiceServers().refusal_of_endpoint(endpoint)


def test_a_refusal_says_what_is_allowed() -> None:
    """With the name of the setting."""
    told = VoiceServers("voice.example").refusal_of_endpoint("elsewhere.example:443")
    assert told == "elsewhere.example is no voice server that GUILDCAST_VOICE_HOSTS allows (voice.example)"


def test_networks_may_be_allowed_as_hosts() -> None:
    """For servers that have no name, as a stand-in on this machine."""
    servers = VoiceServers("voice.example, 127.0.0.0/8,::1")
    endpoints = ("voice.example", "127.10.0.1:5", "[::1]:5", "128.0.0.1:5", "[::2]:5")
    refused = [one for one in endpoints if servers.refusal_of_endpoint(one)]
    assert refused == ["128.0.0.1:5", "[::2]:5"]


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "239.255.255.250", "255.255.255.255", "240.0.0.1", "192.0.2.1"),
    ],
)
def test_sound_goes_to_public_addresses_alone(address: str) -> None:
    """A server must not aim a stream of packets at what lies inside."""
    assert VoiceServers().refusal_of_address(address)
    assert VoiceServers(networks=address).refusal_of_address(address) == ""


def test_a_public_address_is_allowed() -> None:
    """As Ready names it."""
    assert VoiceServers().refusal_of_address("162.159.128.1") == ""


@pytest.mark.parametrize(
    "value", ["", "https://discord.media", "discord.media,,x", "*.discord.media", "10.0.0.1/8", "a b"]
)
def test_wrong_hosts_are_refused(value: str) -> None:
    """With what is allowed."""
    with pytest.raises(ValueError, match="allowed: "):
        parse_hosts(value)


@pytest.mark.parametrize("value", ["discord.media", "10.0.0.1/8", "::1", "10.0.0.0/33"])
def test_wrong_networks_are_refused(value: str) -> None:
    """With what is allowed; voice servers have IPv4 addresses alone."""
    with pytest.raises(ValueError, match="allowed: "):
        parse_networks(value)
