"""Rules of the local Discord's REST interface and main gateway, seen by a tiny bot that shares no code with them."""

import asyncio
import json
import ssl
import zlib
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Any, Self

import aiohttp
import pytest

from tests.emulator.client import EmulatorClient, EmulatorError
from tests.emulator.local import LocalDiscord
from tests.emulator.main.records import Bot, ChannelPlan, GatewayLimits, GuildPlan

GUILD, OTHER_GUILD = "300000000000000001", "300000000000000002"
VOICE, STAGE, LOUNGE = "400000000000000001", "400000000000000002", "400000000000000003"
GUILDS_AND_VOICE_STATES = 129
ANSWER_S = 5.0


class MainClient:
    """Just enough of a bot; every step can be taken alone and wrongly."""

    def __init__(self, http: aiohttp.ClientSession, tls: ssl.SSLContext, bot: Bot) -> None:
        self.http, self.tls, self.bot = http, tls, bot
        self.ws: aiohttp.ClientWebSocketResponse
        self.opened: list[aiohttp.ClientWebSocketResponse] = []
        self.inflate: zlib._Decompress | None = None
        self.unread: deque[dict[str, Any]] = deque()
        self.sequence: int | None = None
        self.ready: dict[str, Any] = {}
        self.hello: dict[str, Any] = {}

    async def connect(self, url: str | None = None, query: str = "v=10&encoding=json") -> Self:
        """Open the WebSocket and read Hello."""
        self.inflate = zlib.decompressobj() if "zlib-stream" in query else None
        self.ws = await self.http.ws_connect(f"{url or self.bot.gateway_url}/?{query}", ssl=self.tls)
        self.opened.append(self.ws)
        self.unread.clear()
        self.hello = (await self.op(10))["d"]
        return self

    async def say(self, op: int, data: object) -> None:
        """Send one message."""
        await self.ws.send_str(json.dumps({"op": op, "d": data}))

    async def message(self) -> dict[str, Any]:
        """The next message."""
        if self.unread:
            return self.unread.popleft()
        if self.inflate is None:
            text = await self.ws.receive_str(timeout=ANSWER_S)
        else:
            text = self.inflate.decompress(await self.ws.receive_bytes(timeout=ANSWER_S)).decode()
        message: dict[str, Any] = json.loads(text)
        self.sequence = message["s"] or self.sequence
        return message

    async def op(self, op: int) -> dict[str, Any]:
        """The next message with this opcode; others are passed over."""
        while (message := await self.message())["op"] != op:
            pass
        return message

    async def event(self, name: str) -> dict[str, Any]:
        """The `d` of the next event with this name; what comes before it is passed over."""
        while (message := await self.message())["t"] != name:
            pass
        data: dict[str, Any] = message["d"]
        return data

    async def names(self, count: int) -> list[str]:
        """The names of the next events."""
        return [(await self.op(0))["t"] for _ in range(count)]

    async def quiet(self) -> bool:
        """Whether nothing but the answer to a heartbeat comes: what was asked before is then done."""
        await self.say(1, self.sequence)
        return bool((await self.message())["op"] == 11)

    async def closed(self) -> int:
        """The code the server closes with."""
        while True:
            message = await self.ws.receive(timeout=ANSWER_S)
            if message.type is aiohttp.WSMsgType.CLOSE:
                return int(message.data)
            assert message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY), message

    async def identify(self, **changes: object) -> None:
        """Send op 2."""
        identify: dict[str, object] = {"token": self.bot.token, "intents": GUILDS_AND_VOICE_STATES, "properties": {}}
        await self.say(2, identify | changes)

    async def log_in(self, **changes: object) -> Self:
        """Connect, identify, and read what comes at the start."""
        await self.connect()
        await self.identify(**changes)
        self.ready = await self.event("READY")
        for _ in self.ready["guilds"]:
            await self.event("GUILD_CREATE")
        return self

    async def resume(self, sequence: int | None = None, url: str | None = None) -> None:
        """Connect again and send op 6."""
        await self.connect(url or self.ready["resume_gateway_url"])
        seq = self.sequence if sequence is None else sequence
        await self.say(6, {"token": self.bot.token, "session_id": self.ready["session_id"], "seq": seq})

    async def join(self, channel: str | None, guild: str = GUILD, **flags: bool) -> None:
        """Send op 4."""
        own = {"self_mute": False, "self_deaf": True, **flags}
        await self.say(4, {"guild_id": guild, "channel_id": channel, **own})

    async def credentials(self, channel: str = VOICE) -> dict[str, Any]:
        """Join, and put together what both events tell."""
        await self.join(channel)
        state = await self.event("VOICE_STATE_UPDATE")
        server = await self.event("VOICE_SERVER_UPDATE")
        return {"user_id": state["user_id"], "session_id": state["session_id"], **server}

    async def rest(self, method: str, path: str, body: object = None, token: str | None = None) -> tuple[int, Any]:
        """Status and body of a request."""
        headers = {"Authorization": f"Bot {token or self.bot.token}"}
        url = self.bot.api_url + path
        async with self.http.request(method, url, json=body, headers=headers, ssl=self.tls) as answer:
            return answer.status, await answer.json() if answer.status != 204 else None


class VoiceSocket:
    """A voice WebSocket as far as Ready."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws

    async def identify(self, credentials: dict[str, Any]) -> Self:
        """Send op 0."""
        own = {name: credentials[name] for name in ("user_id", "session_id", "token")}
        data = {"server_id": credentials["guild_id"], "max_dave_protocol_version": 1, **own}
        await self.ws.send_str(json.dumps({"op": 0, "d": data}))
        return self

    async def ready(self) -> dict[str, Any]:
        """The `d` of op 2."""
        while True:
            message = json.loads(await self.ws.receive_str(timeout=ANSWER_S))
            if message["op"] == 2:
                return dict(message["d"])

    async def closed(self) -> int:
        """The code the server closes with."""
        while (message := await self.ws.receive(timeout=ANSWER_S)).type is not aiohttp.WSMsgType.CLOSE:
            assert message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY), message
        return int(message.data)


class Bench:
    """A local Discord in this process with one bot in one guild."""

    def __init__(self, emulator: EmulatorClient, http: aiohttp.ClientSession, tls: ssl.SSLContext, bot: Bot) -> None:
        self.emulator, self.http, self.tls, self.bot = emulator, http, tls, bot
        self._clients: list[MainClient] = []

    def client(self, bot: Bot | None = None) -> MainClient:
        """A client of a bot; None: of the one that is there."""
        self._clients.append(MainClient(self.http, self.tls, bot or self.bot))
        return self._clients[-1]

    async def aclose(self) -> None:
        """Close what clients left open: a collection that comes upon it would warn, in whichever test that is."""
        for client in self._clients:
            for ws in client.opened:
                await ws.close()

    async def logged_in(self, **changes: object) -> MainClient:
        """A client of the bot that is there."""
        return await self.client().log_in(**changes)

    async def voice(self, credentials: dict[str, Any]) -> VoiceSocket:
        """A voice session with these credentials."""
        socket = await self.knock(credentials)
        await socket.ready()
        return socket

    async def knock(self, credentials: dict[str, Any]) -> VoiceSocket:
        """A voice WebSocket that has sent Identify."""
        ws = await self.http.ws_connect(f"wss://{credentials['endpoint']}/?v=8", ssl=self.tls)
        return await VoiceSocket(ws).identify(credentials)

    async def fault(self, kind: str, **fields: object) -> None:
        """A fault of the guild."""
        await self.emulator.main_fault(kind, guild=GUILD, **fields)

    async def session_fault(self, kind: str, **fields: object) -> None:
        """A fault of the bot's session."""
        await self.emulator.main_fault(kind, user_id=self.bot.user_id, **fields)

    async def where(self) -> str | None:
        """The channel the bot is in."""
        states = (await self.emulator.main_report()).voice_states
        return next((state.channel for state in states if state.user_id == self.bot.user_id), None)


def plan(*channels: ChannelPlan, guild: str = GUILD) -> GuildPlan:
    """A guild with these channels, or with one of each kind and a second voice channel."""
    usual = [ChannelPlan(VOICE, "voice"), ChannelPlan(STAGE, "stage"), ChannelPlan(LOUNGE, "voice")]
    return GuildPlan(guild, list(channels) or usual)


@asynccontextmanager
async def open_bench(plans: Iterable[GuildPlan] | None = None, **limits: Any) -> AsyncIterator[Bench]:
    """A bench; nobody has to wait between two Identifies unless told so."""
    limits = {"identify_every_s": 0.0, **limits}
    async with LocalDiscord(sample=1, gateway=GatewayLimits(**limits)) as discord:
        tls = ssl.create_default_context(cafile=str(discord.ca_file))
        async with aiohttp.ClientSession() as http, EmulatorClient(discord.control_url) as emulator:
            bot = await emulator.bot(plans if plans is not None else [plan()])
            async with aclosing(Bench(emulator, http, tls, bot)) as opened:
                yield opened


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """A bench with Discord's limits but one."""
    async with open_bench() as opened:
        yield opened


# REST


async def test_a_wrong_token_is_refused(bench: Bench) -> None:
    """Whoever is unknown gets 401, also where the gateway's address for bots is asked."""
    client = bench.client()
    for path in ("/users/@me", "/gateway/bot", "/oauth2/applications/@me"):
        assert (await client.rest("GET", path, token="wrong"))[0] == 401
        assert (await client.rest("GET", path))[0] == 200
    assert (await client.rest("GET", "/gateway", token="wrong"))[0] == 200


async def test_rest_tells_where_the_gateway_is_and_how_often_to_identify(bench: Bench) -> None:
    """The remaining Identifies fall with each one; the bot's user id is that of the token."""
    client = bench.client()
    assert (await client.rest("GET", "/users/@me"))[1]["id"] == bench.bot.user_id
    _, before = await client.rest("GET", "/gateway/bot")
    assert (before["url"], before["shards"]) == (bench.bot.gateway_url, 1)
    assert before["session_start_limit"].items() >= {"total": 1000, "remaining": 1000, "max_concurrency": 1}.items()
    await client.log_in()
    _, after = await client.rest("GET", "/gateway/bot")
    assert after["session_start_limit"]["remaining"] == 999
    assert 0 < after["session_start_limit"]["reset_after"] <= 86_400_000


async def test_too_many_requests_have_to_wait() -> None:
    """Past the limit of a second 429 tells how long."""
    async with open_bench(requests_per_s=2) as bench:
        client = bench.client()
        answers = [await client.rest("GET", "/users/@me") for _ in range(3)]
        assert [status for status, _ in answers] == [200, 200, 429]
        assert 0 < answers[-1][1]["retry_after"] <= 1


async def test_a_bot_takes_the_stage_when_it_is_allowed_to() -> None:
    """Who joins a stage is suppressed; REST lifts that, but not without the permission, nor elsewhere."""
    mute_stage = ChannelPlan(LOUNGE, "stage", speak=False)
    async with open_bench([plan(ChannelPlan(VOICE, "voice"), ChannelPlan(STAGE, "stage"), mute_stage)]) as bench:
        client = await bench.logged_in()
        path = f"/guilds/{GUILD}/voice-states/@me"
        assert (await client.rest("PATCH", path, {"channel_id": STAGE, "suppress": False}))[0] == 404
        await client.join(STAGE)
        assert (await client.event("VOICE_STATE_UPDATE"))["suppress"] is True
        assert (await client.rest("PATCH", path, {"channel_id": STAGE, "suppress": False}))[0] == 204
        assert (await client.event("VOICE_STATE_UPDATE"))["suppress"] is False
        assert (await client.rest("GET", path))[1]["suppress"] is False
        await client.join(LOUNGE)
        assert (await client.event("VOICE_STATE_UPDATE"))["suppress"] is True
        assert (await client.rest("PATCH", path, {"suppress": False}))[0] == 403
        asked = {"request_to_speak_timestamp": "2026-11-21T10:00:00+00:00"}
        assert (await client.rest("PATCH", path, asked))[0] == 204
        assert (await client.event("VOICE_STATE_UPDATE"))["request_to_speak_timestamp"] is not None
        await client.join(VOICE)
        assert (await client.event("VOICE_STATE_UPDATE"))["suppress"] is False
        assert (await client.rest("PATCH", path, {"channel_id": VOICE, "suppress": False}))[0] == 400


async def test_the_status_of_a_voice_channel_can_be_set_from_inside(bench: Bench) -> None:
    """Only who is in the channel may; the others are told."""
    client = await bench.logged_in()
    path = f"/channels/{VOICE}/voice-status"
    assert (await client.rest("PUT", path, {"status": "news"}))[0] == 403
    await client.credentials()
    assert (await client.rest("PUT", path, {"status": "news"}))[0] == 204
    assert (await client.event("VOICE_CHANNEL_STATUS_UPDATE")) == {"id": VOICE, "guild_id": GUILD, "status": "news"}
    assert (await bench.emulator.main_report()).channel_status == {VOICE: "news"}


# logging in


@pytest.mark.parametrize("compress", ["", "&compress=zlib-stream"])
async def test_a_bot_is_told_who_it_is_and_what_there_is(bench: Bench, compress: str) -> None:
    """READY names the guilds, GUILD_CREATE tells their channels and who is in them; numbers rise by one."""
    member = await bench.emulator.members.join(GUILD, channel=VOICE)
    client = await bench.client().connect(query=f"v=10&encoding=json{compress}")
    assert client.hello["heartbeat_interval"] == 41_250
    await client.say(1, None)
    assert (await client.message())["op"] == 11
    await client.identify()
    ready = await client.message()
    assert (ready["t"], ready["s"], ready["d"]["v"]) == ("READY", 1, 10)
    assert ready["d"]["user"]["id"] == bench.bot.user_id
    assert ready["d"]["guilds"] == [{"id": GUILD, "unavailable": True}]
    assert ready["d"]["resume_gateway_url"] != bench.bot.gateway_url
    guild = await client.message()
    assert (guild["t"], guild["s"], guild["d"]["id"]) == ("GUILD_CREATE", 2, GUILD)
    assert {channel["id"]: channel["type"] for channel in guild["d"]["channels"]} == {VOICE: 2, STAGE: 13, LOUNGE: 2}
    (state,) = guild["d"]["voice_states"]
    assert (state["user_id"], state["channel_id"], "guild_id" in state) == (member.user, VOICE, False)
    await bench.emulator.members.leave(GUILD, member.user)
    left = await client.event("VOICE_STATE_UPDATE")
    assert (left["user_id"], left["channel_id"]) == (member.user, None)


async def test_a_guild_entered_later_is_told(bench: Bench) -> None:
    """GUILD_CREATE comes also after the start."""
    client = await bench.logged_in()
    await bench.emulator.bot([plan(ChannelPlan("400000000000000009"), guild=OTHER_GUILD)], user_id=bench.bot.user_id)
    assert (await client.event("GUILD_CREATE"))["id"] == OTHER_GUILD


async def test_a_shard_hears_of_its_own_guilds_only() -> None:
    """A guild belongs to the shard that its id says; op 4 through another one does nothing."""
    guilds = [str(number << 22) for number in (10, 11)]
    plans = [plan(ChannelPlan(str((100 + number) << 22)), guild=guild) for number, guild in enumerate(guilds)]
    async with open_bench(plans, max_concurrency=2) as bench:
        client = await bench.logged_in(shard=[1, 2])
        assert client.ready["guilds"] == [{"id": guilds[1], "unavailable": True}]
        await client.join(str(100 << 22), guild=guilds[0])
        assert await client.quiet()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"token": "wrong"}, 4004),
        ({"shard": [2, 2]}, 4010),
        ({"shard": [0, 0]}, 4010),
        ({"intents": 1 << 40}, 4013),
        ({"intents": 1 << 15}, 4014),
        ({"intents": "all"}, 4002),
        ({"properties": None}, 4002),
    ],
)
async def test_a_wrong_identify_is_refused(bench: Bench, changes: dict[str, object], code: int) -> None:
    """The close code says what was wrong."""
    client = await bench.client().connect()
    await client.identify(**changes)
    assert await client.closed() == code
    assert (await bench.emulator.main_report()).refused == {str(code): 1}


async def test_too_many_guilds_for_one_shard_are_refused() -> None:
    """Sharding is required past the limit."""
    plans = [plan(), plan(ChannelPlan("400000000000000009"), guild=OTHER_GUILD)]
    async with open_bench(plans, guilds_per_shard=1) as bench:
        client = await bench.client().connect()
        await client.identify()
        assert await client.closed() == 4011


@pytest.mark.parametrize("query", ["v=9&encoding=json", "encoding=json", "v=10&encoding=etf"])
async def test_only_version_10_in_json_is_served(bench: Bench, query: str) -> None:
    """Anything else is an invalid version."""
    client = bench.client()
    client.ws = await bench.http.ws_connect(f"{bench.bot.gateway_url}/?{query}", ssl=bench.tls)
    assert await client.closed() == 4012


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ('{"op": 4, "d": {}}', 4003),
        ('{"op": 99, "d": {}}', 4003),
        ("rubbish", 4002),
        (json.dumps({"op": 1, "d": "x" * 4096}), 4002),
        (b'{"op": 1, "d": null}', 4002),
    ],
)
async def test_nothing_is_understood_before_identify(bench: Bench, said: str | bytes, code: int) -> None:
    """Only heartbeats, Identify and Resume are; what is too long or no JSON never is."""
    client = await bench.client().connect()
    await (client.ws.send_bytes(said) if isinstance(said, bytes) else client.ws.send_str(said))
    assert await client.closed() == code


@pytest.mark.parametrize(
    ("op", "data", "code"),
    [(99, None, 4001), (4, {"guild_id": GUILD}, 4002), (2, {}, 4005), (6, {}, 4005)],
)
async def test_mistakes_of_a_bot_close_its_connection(bench: Bench, op: int, data: object, code: int) -> None:
    """Unknown opcodes, fields that are missing, and a second Identify."""
    client = await bench.logged_in()
    await client.say(op, data)
    assert await client.closed() == code


async def test_presence_and_members_do_no_harm(bench: Bench) -> None:
    """Op 3 is passed over, op 8 answered with the bot alone."""
    client = await bench.logged_in()
    await client.say(3, {"since": None, "activities": [], "status": "online", "afk": False})
    await client.say(8, {"guild_id": GUILD, "query": "", "limit": 0, "nonce": "n"})
    chunk = await client.event("GUILD_MEMBERS_CHUNK")
    assert (chunk["nonce"], chunk["chunk_count"]) == ("n", 1)
    assert [member["user"]["id"] for member in chunk["members"]] == [bench.bot.user_id]


# limits


async def test_more_commands_than_allowed_close_the_connection() -> None:
    """4008 comes with the first one above the limit; the session can be resumed."""
    async with open_bench(commands=5) as bench:
        client = await bench.logged_in()
        for _ in range(4):
            await client.say(1, client.sequence)
            await client.op(11)
        await client.say(1, client.sequence)
        assert await client.closed() == 4008
        await client.resume()
        await client.event("RESUMED")


async def test_identifies_of_one_bucket_have_to_wait() -> None:
    """Within the time another shard of the same bucket is told that its session is invalid, one of another is not."""
    async with open_bench(max_concurrency=2, identify_every_s=60.0) as bench:
        await bench.logged_in(shard=[0, 3])
        await bench.logged_in(shard=[1, 3])
        client = await bench.client().connect()
        await client.identify(shard=[2, 3])
        assert (await client.op(9))["d"] is False
        assert (await bench.emulator.main_report()).refused == {"9": 1}


async def test_a_bot_may_identify_again_on_the_same_connection() -> None:
    """After op 9 the next Identify counts, once enough time has passed."""
    async with open_bench(identify_every_s=0.2) as bench:
        await bench.logged_in()
        client = await bench.client().connect()
        async with asyncio.timeout(ANSWER_S):
            while True:
                await client.identify()
                if (await client.message())["op"] == 0:
                    return
                await asyncio.sleep(0.05)


async def test_too_many_identifies_in_a_day_cost_the_token() -> None:
    """The token is reset, for REST too."""
    async with open_bench(identifies_per_day=1) as bench:
        client = await bench.logged_in()
        other = await bench.client().connect()
        await other.identify()
        assert await other.closed() == 4004
        assert (await client.rest("GET", "/users/@me"))[0] == 401


async def test_a_bot_without_heartbeats_is_timed_out() -> None:
    """The session is over then."""
    async with open_bench(heartbeat_interval_ms=40) as bench:
        client = await bench.logged_in()
        assert await client.closed() == 4009
        assert (await bench.emulator.main_report()).sessions == []


# calls


async def test_a_join_tells_both_events_and_real_credentials(bench: Bench) -> None:
    """The session id is that of the main session; with token and endpoint the voice server lets the bot in."""
    client = await bench.logged_in()
    await client.join(VOICE, self_mute=True)
    state = await client.event("VOICE_STATE_UPDATE")
    assert (state["channel_id"], state["guild_id"]) == (VOICE, GUILD)
    assert (state["self_mute"], state["self_deaf"], state["suppress"]) == (True, True, False)
    assert state["session_id"] == client.ready["session_id"]
    assert state["member"]["user"]["id"] == bench.bot.user_id
    server = await client.event("VOICE_SERVER_UPDATE")
    voice = await bench.voice({"user_id": bench.bot.user_id, "session_id": state["session_id"], **server})
    assert await bench.where() == VOICE
    await voice.ws.close()


async def test_a_leave_is_told_and_ends_the_voice_session(bench: Bench) -> None:
    """The channel is null, the voice session closes with 4014, the credentials are void."""
    client = await bench.logged_in()
    credentials = await client.credentials()
    voice = await bench.voice(credentials)
    await client.join(None)
    assert (await client.event("VOICE_STATE_UPDATE"))["channel_id"] is None
    assert await voice.closed() == 4014
    assert await (await bench.knock(credentials)).closed() == 4006
    await client.join(None)
    assert await client.quiet()


async def test_a_move_by_the_bot_itself_brings_a_new_token(bench: Bench) -> None:
    """The endpoint stays; the older voice session is over."""
    client = await bench.logged_in()
    first = await client.credentials(VOICE)
    voice = await bench.voice(first)
    second = await client.credentials(LOUNGE)
    assert second["endpoint"] == first["endpoint"]
    assert second["token"] != first["token"]
    assert await voice.closed() == 4014
    await (await bench.voice(second)).ws.close()


async def test_joining_where_one_is_changes_nothing_while_the_voice_session_lives(bench: Bench) -> None:
    """Changed flags are told; a new token comes only when there is no voice session any more."""
    client = await bench.logged_in()
    voice = await bench.voice(await client.credentials())
    await client.join(VOICE)
    assert await client.quiet()
    await client.join(VOICE, self_mute=True)
    assert (await client.event("VOICE_STATE_UPDATE"))["self_mute"] is True
    assert await client.quiet()
    await bench.emulator.fault(GUILD, "close", code=4006, user=bench.bot.user_id)
    assert await voice.closed() == 4006
    await (await bench.voice(await client.credentials())).ws.close()


async def test_without_the_intent_no_voice_state_is_told(bench: Bench) -> None:
    """The server update comes all the same."""
    client = await bench.logged_in(intents=1)
    await client.join(VOICE)
    assert await client.names(1) == ["VOICE_SERVER_UPDATE"]
    assert await client.quiet()


async def test_what_may_not_be_joined_is_passed_over_in_silence() -> None:
    """A channel without permission, a full one, one that does not exist, a guild that one is not in."""
    channels = (ChannelPlan(VOICE, "voice", connect=False), ChannelPlan(STAGE, "stage", user_limit=1, members=1))
    async with open_bench([plan(*channels)]) as bench:
        client = await bench.logged_in()
        for channel in (VOICE, STAGE, "1"):
            await client.join(channel)
        await client.join(VOICE, guild=OTHER_GUILD)
        assert await client.quiet()
        assert await bench.where() is None


async def test_the_voice_session_ends_with_the_main_session(bench: Bench) -> None:
    """Closing with 1000 ends the main session; 4014 follows on the voice WebSocket."""
    client = await bench.logged_in()
    voice = await bench.voice(await client.credentials())
    await client.ws.close(code=1000)
    assert await voice.closed() == 4014
    assert await bench.where() is None


async def test_the_voice_session_outlives_a_lost_connection() -> None:
    """As long as the main session can be resumed nothing happens to the call; then it ends."""
    async with open_bench(resume_window_s=1.0) as bench:
        client = await bench.logged_in()
        voice = await bench.voice(await client.credentials())
        await client.ws.close(code=4000)
        assert await bench.where() == VOICE
        assert await voice.closed() == 4014


# resume


async def test_a_resume_replays_what_was_missed(bench: Bench) -> None:
    """Events come with their old numbers, then RESUMED; the call goes on, and no Identify is counted."""
    client = await bench.logged_in()
    await client.credentials()
    seen = client.sequence
    assert seen is not None
    await client.ws.close(code=4000)
    await bench.emulator.bot([plan(ChannelPlan("400000000000000009"), guild=OTHER_GUILD)], user_id=bench.bot.user_id)
    await client.resume()
    missed = await client.message()
    assert (missed["t"], missed["s"]) == ("GUILD_CREATE", seen + 1)
    assert ((await client.message())["t"], client.sequence) == ("RESUMED", seen + 2)
    report = await bench.emulator.main_report()
    assert (report.identifies, report.resumes, report.sessions[0].resumed) == (1, 1, 1)
    assert await bench.where() == VOICE


async def test_a_resume_that_cannot_be_is_refused(bench: Bench) -> None:
    """A session that nobody knows is invalid, a number that was never reached closes with 4007 and ends it."""
    client = await bench.logged_in()
    known = client.ready["session_id"]
    client.ready["session_id"] = "unknown"
    await client.resume()
    assert (await client.op(9))["d"] is False
    client.ready["session_id"] = known
    await client.resume(sequence=1_000)
    assert await client.closed() == 4007
    await client.resume()
    assert (await client.op(9))["d"] is False


async def test_a_resume_too_far_back_is_refused() -> None:
    """What is forgotten cannot be replayed."""
    async with open_bench(replay_events=2) as bench:
        client = await bench.logged_in()
        await client.credentials()
        await client.resume(sequence=1)
        assert (await client.op(9))["d"] is False


async def test_a_second_connection_of_a_session_closes_the_first(bench: Bench) -> None:
    """Only the newest counts."""
    client = await bench.logged_in()
    first = client.ws
    await client.resume()
    await client.event("RESUMED")
    client.ws = first
    assert await client.closed() == 4000


# faults of a session


async def test_a_session_can_be_told_to_reconnect(bench: Bench) -> None:
    """Op 7, op 1 and op 9 on demand; an invalid session that may be resumed lives on."""
    client = await bench.logged_in()
    await bench.session_fault("reconnect")
    await client.op(7)
    await bench.session_fault("heartbeat")
    await client.op(1)
    await bench.session_fault("invalidate", resumable=True)
    assert (await client.op(9))["d"] is True
    await client.resume()
    await client.event("RESUMED")


async def test_an_invalidated_session_loses_its_calls(bench: Bench) -> None:
    """Op 9 with false: the voice session closes with 4014, nothing can be resumed."""
    client = await bench.logged_in()
    voice = await bench.voice(await client.credentials())
    await bench.session_fault("invalidate")
    assert (await client.op(9))["d"] is False
    assert await voice.closed() == 4014
    await client.resume()
    assert (await client.op(9))["d"] is False


async def test_a_connection_can_be_closed_or_broken(bench: Bench) -> None:
    """With any code, or without one; the session can be resumed after either."""
    client = await bench.logged_in()
    await bench.session_fault("close", code=4000)
    assert await client.closed() == 4000
    await client.resume()
    await client.event("RESUMED")
    await bench.session_fault("drop")
    while (message := await client.ws.receive(timeout=ANSWER_S)).type is aiohttp.WSMsgType.TEXT:
        pass
    assert message.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)
    with pytest.raises(EmulatorError, match="no open WebSocket"):
        await bench.session_fault("drop")
    await client.resume()
    await client.event("RESUMED")


async def test_heartbeats_can_go_unanswered(bench: Bench) -> None:
    """Until the fault is taken back."""
    client = await bench.logged_in()
    await bench.session_fault("no_ack")
    await client.say(1, client.sequence)
    await bench.session_fault("heartbeat")
    assert (await client.message())["op"] == 1
    await bench.session_fault("no_ack", on=False)
    assert await client.quiet()


async def test_a_resume_can_be_refused(bench: Bench) -> None:
    """The session is invalid when the bot comes back."""
    client = await bench.logged_in()
    await bench.session_fault("refuse_resume")
    await client.ws.close(code=4000)
    await client.resume()
    assert (await client.op(9))["d"] is False


# faults of a join


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        ("swapped", ["VOICE_SERVER_UPDATE", "VOICE_STATE_UPDATE"]),
        ("state_only", ["VOICE_STATE_UPDATE"]),
        ("server_only", ["VOICE_SERVER_UPDATE"]),
        ("nothing", []),
    ],
)
async def test_a_join_can_be_answered_otherwise_once(bench: Bench, answer: str, names: list[str]) -> None:
    """Events in the other order, one of them, none; the join after that is answered as usual."""
    client = await bench.logged_in()
    await bench.fault("join", answer=answer)
    await client.join(VOICE)
    assert await client.names(len(names)) == names
    assert await client.quiet()
    await client.join(LOUNGE)
    assert await client.names(2) == ["VOICE_STATE_UPDATE", "VOICE_SERVER_UPDATE"]


async def test_a_join_can_be_answered_late(bench: Bench) -> None:
    """Nothing is told before."""
    client = await bench.logged_in()
    await bench.fault("join", delay_ms=1_000)
    await client.join(VOICE)
    assert await client.quiet()
    assert await client.names(2) == ["VOICE_STATE_UPDATE", "VOICE_SERVER_UPDATE"]


async def test_a_voice_server_can_be_missing_at_first(bench: Bench) -> None:
    """The endpoint is null, and told when there is one."""
    client = await bench.logged_in()
    await bench.fault("join", null_ms=1_000)
    await client.join(VOICE)
    state = await client.event("VOICE_STATE_UPDATE")
    assert (await client.event("VOICE_SERVER_UPDATE"))["endpoint"] is None
    assert await client.quiet()
    server = await client.event("VOICE_SERVER_UPDATE")
    voice = await bench.voice({"user_id": bench.bot.user_id, "session_id": state["session_id"], **server})
    await voice.ws.close()


async def test_a_channel_can_be_full(bench: Bench) -> None:
    """Joins are passed over until it is not."""
    client = await bench.logged_in()
    await bench.fault("full", channel=VOICE)
    await client.join(VOICE)
    assert await client.quiet()
    await bench.fault("full", channel=VOICE, on=False)
    await client.credentials()


async def test_a_join_of_the_same_channel_can_be_ignored(bench: Bench) -> None:
    """Even without a voice session; leaving and joining brings new credentials."""
    client = await bench.logged_in()
    await client.credentials()
    await bench.fault("ignore_rejoin")
    await client.join(VOICE)
    assert await client.quiet()
    await client.join(None)
    await client.event("VOICE_STATE_UPDATE")
    await client.credentials()


# faults of a call


@pytest.mark.parametrize("order", ["events_first", "close_first", "events_only", "close_only"])
@pytest.mark.parametrize("code", [4014, 4022])
async def test_a_kick_closes_and_tells_in_either_order(bench: Bench, order: str, code: int) -> None:
    """The voice session closes, the voice state is null; or only one of them."""
    client = await bench.logged_in()
    voice = await bench.voice(await client.credentials())
    await bench.fault("kick", order=order, code=code, gap_ms=500)
    if order == "events_first":
        assert (await client.event("VOICE_STATE_UPDATE"))["channel_id"] is None
    if order != "events_only":
        assert await voice.closed() == code
    if order == "close_first":
        assert await client.quiet()
    if order in ("close_first", "events_only"):
        assert (await client.event("VOICE_STATE_UPDATE"))["channel_id"] is None
    if order == "close_only":
        assert await client.quiet()
    assert await bench.where() == (VOICE if order == "close_only" else None)
    await voice.ws.close()


@pytest.mark.parametrize("order", ["events_first", "close_first", "events_only"])
async def test_a_move_brings_new_credentials_in_either_order(bench: Bench, order: str) -> None:
    """The state names the new channel, a server update follows, and the voice session closes with 4014."""
    client = await bench.logged_in()
    voice = await bench.voice(await client.credentials())
    await bench.fault("move", channel=LOUNGE, order=order)
    if order == "close_first":
        assert await voice.closed() == 4014
    state = await client.event("VOICE_STATE_UPDATE")
    assert state["channel_id"] == LOUNGE
    server = await client.event("VOICE_SERVER_UPDATE")
    if order == "events_first":
        assert await voice.closed() == 4014
    moved = await bench.voice({"user_id": bench.bot.user_id, "session_id": state["session_id"], **server})
    await moved.ws.close()
    await voice.ws.close()


@pytest.mark.parametrize("null_ms", [None, 100])
async def test_a_guild_can_go_to_another_voice_server(bench: Bench, null_ms: int | None) -> None:
    """The endpoint is another one, at once or after null; the older credentials are worth nothing there."""
    client = await bench.logged_in()
    before = await client.credentials()
    voice = await bench.voice(before)
    await bench.fault("server", null_ms=null_ms)
    if null_ms:
        assert (await client.event("VOICE_SERVER_UPDATE"))["endpoint"] is None
    server = await client.event("VOICE_SERVER_UPDATE")
    assert server["endpoint"] != before["endpoint"]
    assert await voice.closed() == 4014
    assert await (await bench.knock({**before, "endpoint": server["endpoint"]})).closed() == 4004
    await (await bench.voice({**before, **server})).ws.close()


async def test_a_join_between_a_close_and_its_event_stands(bench: Bench) -> None:
    """Who was quick enough to join anew is not told of the kick before."""
    client = await bench.logged_in()
    voice = await bench.voice(await client.credentials())
    await bench.fault("kick", order="close_first", gap_ms=300)
    assert await voice.closed() == 4022  # nobody else was there
    await client.credentials()
    await bench.fault("server", null_ms=400)  # its second event comes after that of the kick would
    assert await client.names(2) == ["VOICE_SERVER_UPDATE"] * 2
    assert await bench.where() == VOICE


async def test_another_voice_server_is_told_to_bots_only(bench: Bench) -> None:
    """Members stay where they are, and hear the bot that came by the new credentials."""
    client = await bench.logged_in()
    voice = await bench.voice(await client.credentials())
    member = await bench.emulator.members.join(GUILD, channel=VOICE)
    await client.event("VOICE_STATE_UPDATE")
    await bench.fault("server")
    await client.event("VOICE_SERVER_UPDATE")
    assert await client.quiet()
    assert await voice.closed() == 4014
    states = (await bench.emulator.main_report()).voice_states
    assert {state.user_id for state in states} == {member.user, bench.bot.user_id}
    (row,) = (await bench.emulator.report(guilds=True)).guild_rows or []
    assert {session.user for session in row.sessions} == {bench.bot.user_id}


async def test_a_token_can_change_on_the_same_voice_server(bench: Bench) -> None:
    """The older voice session closes with 4006."""
    client = await bench.logged_in()
    before = await client.credentials()
    voice = await bench.voice(before)
    await bench.fault("token")
    server = await client.event("VOICE_SERVER_UPDATE")
    assert server["endpoint"] == before["endpoint"]
    assert server["token"] != before["token"]
    assert await voice.closed() == 4006
    await (await bench.voice({**before, **server})).ws.close()


@pytest.mark.parametrize("unavailable", [True, False])
async def test_a_guild_can_go_and_come_back(bench: Bench, unavailable: bool) -> None:
    """GUILD_DELETE tells which of both it was; the call ends, joins do nothing until GUILD_CREATE."""
    client = await bench.logged_in()
    voice = await bench.voice(await client.credentials())
    await bench.fault("guild_gone", unavailable=unavailable)
    gone = await client.event("GUILD_DELETE")
    assert gone.get("unavailable", False) is unavailable
    assert await voice.closed() == 4014
    await client.join(VOICE)
    assert await client.quiet()
    await bench.fault("guild_gone", unavailable=unavailable, on=False, user_id=bench.bot.user_id)
    assert (await client.event("GUILD_CREATE"))["id"] == GUILD
    await client.credentials()


async def test_two_bots_share_a_channel_and_see_each_other(bench: Bench) -> None:
    """Each has a voice session of its own; a kick has to name whom it means."""
    client = await bench.logged_in()
    other_bot = await bench.emulator.bot([GuildPlan(GUILD)])
    other = await bench.client(other_bot).log_in()
    first = await bench.voice(await client.credentials())
    seen = await other.event("VOICE_STATE_UPDATE")
    assert seen["user_id"] == bench.bot.user_id
    second = await bench.voice(await other.credentials())
    with pytest.raises(EmulatorError, match="2 users"):
        await bench.fault("kick")
    await bench.fault("kick", user_id=other_bot.user_id)
    assert await second.closed() == 4014
    await first.ws.close()


async def test_faults_name_what_they_do_not_find(bench: Bench) -> None:
    """A guild, a channel, a bot, a session, a kind, a code."""
    with pytest.raises(EmulatorError, match="404"):
        await bench.emulator.main_fault("kick", guild=OTHER_GUILD)
    with pytest.raises(EmulatorError, match="404"):
        await bench.fault("full", channel="1")
    with pytest.raises(EmulatorError, match="404"):
        await bench.emulator.main_fault("drop", user_id="1")
    with pytest.raises(EmulatorError, match="409"):
        await bench.fault("kick")
    with pytest.raises(EmulatorError, match="400"):
        await bench.fault("no_such_kind")
    with pytest.raises(EmulatorError, match="400"):
        await bench.session_fault("close", code=999)


async def test_stopping_says_farewell() -> None:
    """Who is connected when the local Discord stops is told 1001."""
    async with aiohttp.ClientSession() as http:
        async with LocalDiscord(sample=1) as discord:
            tls = ssl.create_default_context(cafile=str(discord.ca_file))
            async with EmulatorClient(discord.control_url) as emulator:
                client = await MainClient(http, tls, await emulator.bot([plan()])).log_in()
                reader = asyncio.create_task(client.closed())
        assert await reader == 1001
