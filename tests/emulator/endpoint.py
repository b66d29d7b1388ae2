"""Voice servers: a TLS WebSocket listener and a UDP socket on one loopback address."""

import asyncio
import ssl
from dataclasses import dataclass, field
from socket import AF_INET, SOCK_DGRAM, socket

from aiohttp import web

from tests.emulator.datagrams import hear_all, hear_little, hear_nothing, open_socket, replace_socket
from tests.emulator.faults import ConnectFaults, PathState

ADDRESSES = tuple(f"127.10.0.{number}" for number in range(1, 17))


@dataclass(slots=True, eq=False)
class Endpoint:
    """One voice server; `number` is its place among all. One that is not `listened` to hears each 64th packet."""

    number: int
    address: str
    port: int
    udp: socket
    udp_port: int
    listened: bool
    site: web.TCPSite
    coming: ConnectFaults = field(default_factory=ConnectFaults)


class Endpoints:
    """Opens a voice server for every `guilds_each` guilds, on one address after the other.

    The first of every `listen_every` is listened to.
    """

    def __init__(self, runner: web.BaseRunner, tls: ssl.SSLContext, guilds_each: int, listen_every: int = 1) -> None:
        self._runner = runner
        self._tls = tls
        self._guilds_each = guilds_each
        self._listen_every = listen_every
        self._guilds = 0
        self._opening = asyncio.Lock()
        self.opened: list[Endpoint] = []
        self._by_name: dict[tuple[str, int], Endpoint] = {}
        self._shut: set[asyncio.Task[None]] = set()

    async def for_next_guild(self) -> Endpoint:
        """The endpoint of a guild not seen before."""
        async with self._opening:
            if self._guilds % self._guilds_each == 0:
                await self._open()
            self._guilds += 1
            return self.opened[-1]

    async def other_than(self, endpoint: Endpoint) -> Endpoint:
        """Another endpoint."""
        async with self._opening:
            if len(self.opened) == 1:
                await self._open()
            return self.opened[endpoint.number - 1]

    def at(self, address: str, port: int) -> Endpoint:
        """The endpoint whose WebSocket listener has this address."""
        return self._by_name[address, port]

    async def _open(self) -> None:
        number = len(self.opened)
        address = ADDRESSES[number % len(ADDRESSES)]
        site = await self._listen(address, 0)
        port = int(site.port or 0)
        udp = open_socket(address)
        listened = number % self._listen_every == 0
        if not listened:
            hear_little(udp)
        endpoint = Endpoint(number, address, port, udp, udp.getsockname()[1], listened, site)
        self.opened.append(endpoint)
        self._by_name[address, port] = endpoint

    async def _listen(self, address: str, port: int) -> web.TCPSite:
        site = web.TCPSite(self._runner, address, port, ssl_context=self._tls, reuse_address=True)
        await site.start()
        return site

    def shut(self, endpoint: Endpoint, for_s: float) -> None:
        """Listen to no new WebSocket for a while; who is connected stays so."""
        task = asyncio.create_task(self._open_again(endpoint, for_s))
        self._shut.add(task)
        task.add_done_callback(self._shut.discard)

    async def _open_again(self, endpoint: Endpoint, after_s: float) -> None:
        await endpoint.site.stop()
        await asyncio.sleep(after_s)
        endpoint.site = await self._listen(endpoint.address, endpoint.port)

    @staticmethod
    def set_path(endpoint: Endpoint, how: PathState) -> None:
        """Let datagrams vanish on their way to an endpoint, or have them refused; `open`: neither."""
        if how == "swallow":
            hear_nothing(endpoint.udp)
        elif how == "refuse":
            replace_socket(endpoint.udp, socket(AF_INET, SOCK_DGRAM))
        elif endpoint.udp.getsockname()[1] == endpoint.udp_port:
            hear_all(endpoint.udp)
        else:
            replace_socket(endpoint.udp, open_socket(endpoint.address, endpoint.udp_port))

    def close(self) -> None:
        """Close the UDP sockets; the listeners belong to the runner."""
        for task in self._shut:
            task.cancel()
        for endpoint in self.opened:
            endpoint.udp.close()
