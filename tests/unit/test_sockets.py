"""UDP sockets shared by guild connections."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Callable

import pytest

from shared.errors import ErrorCode, VoiceError
from worker.fanout import sockets
from worker.fanout.sockets import SocketPool


@pytest.fixture
async def make_pool() -> AsyncIterator[Callable[..., SocketPool]]:
    pools: list[SocketPool] = []

    def make(ports: range = range(0), *, per_guild: bool = False) -> SocketPool:
        pool = SocketPool("127.0.0.1", ports, per_guild=per_guild, on_new=lambda _: None)
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close()


def free_ports(count: int) -> range:
    """Consecutive ports that nobody uses at the moment."""
    for start in range(41_000, 60_000, 50):
        probes: list[socket.socket] = []
        try:
            for port in range(start, start + count):
                probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                probes.append(probe)
                probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        else:
            return range(start, start + count)
        finally:
            for probe in probes:
                probe.close()
    raise AssertionError("no free ports")


def ignore(_: bytes) -> None:
    return


async def test_one_socket_never_carries_two_connections_to_one_address(make_pool: Callable[..., SocketPool]) -> None:
    """A second connection to the same voice server gets another socket; one to another server shares the first."""
    pool = make_pool()
    first = pool.lease(("127.0.0.1", 5_000), ignore)
    second = pool.lease(("127.0.0.1", 5_000), ignore)
    third = pool.lease(("127.0.0.1", 5_001), ignore)
    assert first.number != second.number
    assert third.number in (first.number, second.number)
    assert len(pool.sockets) == 2


async def test_a_released_five_tuple_is_used_again(make_pool: Callable[..., SocketPool]) -> None:
    """Connections that come and go need no more sockets than there are at one time."""
    pool = make_pool()
    for _ in range(20):
        pool.lease(("127.0.0.1", 5_000), ignore).release()
    assert len(pool.sockets) == 1


async def test_per_guild_means_a_socket_each(make_pool: Callable[..., SocketPool]) -> None:
    """With sharing turned off, no two connections are on one socket."""
    pool = make_pool(per_guild=True)
    ports = [pool.lease(("127.0.0.1", 5_000 + number), ignore) for number in range(3)]
    assert len({port.number for port in ports}) == 3


async def test_a_used_up_range_names_the_setting(make_pool: Callable[..., SocketPool]) -> None:
    """When all dealt ports are taken, the error says which setting to widen."""
    pool = make_pool(free_ports(2))
    for _ in range(2):
        pool.lease(("127.0.0.1", 5_000), ignore)
    with pytest.raises(VoiceError, match="GUILDCAST_UDP_PORTS") as caught:
        pool.lease(("127.0.0.1", 5_000), ignore)
    assert caught.value.code == ErrorCode.UDP_PORTS_TOO_FEW


async def test_a_port_that_somebody_took_meanwhile_is_passed_over(make_pool: Callable[..., SocketPool]) -> None:
    """A busy port of the range costs itself alone; when only busy ones are left, the error says so."""
    ports = free_ports(2)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", ports[0]))
        pool = make_pool(ports)
        pool.lease(("127.0.0.1", 5_000), ignore)
        assert pool.sockets[0].getsockname()[1] == ports[1]
        with pytest.raises(VoiceError) as caught:
            pool.lease(("127.0.0.1", 5_000), ignore)
    assert caught.value.code == ErrorCode.UDP_PORTS_IN_USE


async def test_an_error_is_told_to_whom_it_concerns(make_pool: Callable[..., SocketPool]) -> None:
    """Of two connections on a socket the one whose server refuses hears of it, and the other its own datagrams."""
    pool = make_pool()
    refused: asyncio.Queue[int] = asyncio.Queue()
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    others: list[int] = []
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as there,
    ):
        for one in (gone, there):
            one.bind(("127.0.0.1", 0))
        refusing = gone.getsockname()
        gone.close()
        struck = pool.lease(refusing, ignore, refused.put_nowait)
        other = pool.lease(there.getsockname(), heard.put_nowait, others.append)
        assert struck.number == other.number
        struck.send(b"hello")
        async with asyncio.timeout(5):
            assert await refused.get() == errno.ECONNREFUSED
            there.sendto(b"answer", pool.sockets[0].getsockname())
            assert await heard.get() == b"answer"
    assert others == []


async def test_errors_keep_nobody_busy(make_pool: Callable[..., SocketPool]) -> None:
    """What the kernel tells is taken away: a socket with an error in it would wake the loop for ever."""
    pool = make_pool()
    errors: list[int] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
        gone.bind(("127.0.0.1", 0))
        refusing = gone.getsockname()
    port = pool.lease(refusing, ignore, errors.append)
    for number in range(1, 4):
        port.send(b"hello")
        async with asyncio.timeout(5):
            while len(errors) < number:  # noqa: ASYNC110 - an error wakes the pool, and nobody else
                await asyncio.sleep(0.005)
        with pytest.raises(BlockingIOError):
            pool.sockets[0].recvmsg(1, 64, socket.MSG_ERRQUEUE)


async def test_a_five_tuple_that_lost_its_path_is_shunned_for_a_while(
    make_pool: Callable[..., SocketPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands between may have forgotten it: the next session to that server leaves from another port."""
    monkeypatch.setattr(sockets, "_SHUNNED_FOR_S", 0.05)
    pool = make_pool()
    remote = ("127.0.0.1", 5_000)
    lost = pool.lease(remote, ignore)
    lost.shun()
    lost.release()
    assert pool.lease(remote, ignore).number != lost.number
    assert pool.lease(("127.0.0.1", 5_001), ignore).number in (0, 1)
    await asyncio.sleep(0.06)
    assert pool.lease(remote, ignore).number == lost.number


async def test_datagrams_are_told_apart_by_where_they_come_from(make_pool: Callable[..., SocketPool]) -> None:
    """Two connections on one socket each get their own server's datagrams; a stranger's are counted and dropped."""
    pool = make_pool()
    heard: dict[str, list[bytes]] = {"a": [], "b": []}
    done = asyncio.Event()

    def hear(name: str) -> Callable[[bytes], None]:
        def receive(datagram: bytes) -> None:
            heard[name].append(datagram)
            if heard["a"] and heard["b"]:
                done.set()

        return receive

    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as a,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as b,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger,
    ):
        for one in (a, b, stranger):
            one.bind(("127.0.0.1", 0))
        pool.lease(a.getsockname(), hear("a"))
        pool.lease(b.getsockname(), hear("b"))
        assert len(pool.sockets) == 1
        ours = pool.sockets[0].getsockname()
        stranger.sendto(b"spam", ours)
        a.sendto(b"from a", ours)
        b.sendto(b"from b", ours)
        async with asyncio.timeout(5):
            await done.wait()
    assert heard == {"a": [b"from a"], "b": [b"from b"]}
    assert pool.strays == 1
