"""Faults of a voice server's WebSocket and of the handshake, each a story on a guild of its own.

Source: voice protocol reference, sections 6.9 (fault injection list) and 8 (right column).
"""

from __future__ import annotations

from tests.e2e.fault_room import BUILT_AHEAD, SECOND, SETTLED_WITHIN_S, Due, Room, case

AES, XCHACHA = "aead_aes256_gcm_rtpsize", "aead_xchacha20_poly1305_rtpsize"
UNREADABLE_TEXTS = (
    "{",
    "",
    "null",
    "[]",
    '{"d":{}}',
    '{"op":"8","d":{}}',
    '{"op":99,"d":{}}',
    '{"op":-1,"d":{}}',
    '{"op":5,"d":null}',
    '{"op":5,"d":{"user_id":"x","ssrc":1,"speaking":1}}',
    '{"op":8,"d":{"heartbeat_interval":-5}}',
    '{"op":4,"d":{"mode":"' + AES + '","secret_key":[1,2,3],"dave_protocol_version":1}}',
    '{"op":11,"d":{"user_ids":[17]}}',
    '{"op":13,"d":{}}',
    '{"op":21,"d":{"transition_id":70000,"protocol_version":0}}',
    '{"op":22,"d":{"transition_id":"0"}}',
    '{"op":24,"d":{"epoch":1}}',
    '{"op":29,"d":{}}',
    '{"op":2,"d":{"ssrc":1,"ip":"127.0.0.1","port":9,"modes":[]}}',
    '{"op":9,"d":null}',
    "[" * 10_000,
)
UNREADABLE_BYTES = (b"", b'{"op":5,"d":{}}', bytes([5]), bytes([25]), bytes([27]), bytes([99]) * 50)
CROWD = 600
"""Arrivals that are more messages than a server keeps for a resume."""


# the WebSocket


@case(Due.NOTHING)
async def hello_late(room: Room) -> None:
    """Identify does not wait for Hello; a server that reads late answers late."""
    await room.fault("hello_late", ms=3_000)
    await room.play(SECOND)


@case(Due.NOTHING)
async def hello_with_a_tiny_interval(room: Room) -> None:
    await room.fault("hello_interval", ms=1)
    await room.play(2 * SECOND)


@case(Due.ASKED)
async def closed_at_connect(room: Room) -> None:
    await room.fault("close_on_connect", code=4006)
    await room.play()


@case(Due.AGAIN)
async def closed_at_connect_by_a_crash(room: Room) -> None:
    await room.fault("close_on_connect", code=4015)
    await room.play()


@case(Due.ASKED)
async def closed_at_identify(room: Room) -> None:
    await room.fault("reject", code=4006)
    await room.play()


@case(Due.AGAIN)
async def closed_at_identify_by_a_crash(room: Room) -> None:
    await room.fault("reject", code=4015)
    await room.play()


@case(Due.ASKED)
async def closed_after_ready(room: Room) -> None:
    await room.fault("close_at", step="ready", code=4006)
    await room.ask_to_join()
    await room.renewed()


@case(Due.AGAIN)
async def closed_after_ready_by_a_crash(room: Room) -> None:
    await room.fault("close_at", step="ready", code=4015)
    await room.ask_to_join()
    await room.renewed()


@case(Due.RESUMED)
async def closed_after_the_key_by_a_crash(room: Room) -> None:
    """Op 26 goes down with the WebSocket."""
    await room.fault("close_at", step="description", code=4015)
    await room.play()
    await room.resumed()


@case(Due.ASKED)
async def closed_at_select(room: Room) -> None:
    await room.fault("close_at", step="select", code=4006)
    await room.ask_to_join()
    await room.renewed()


@case(Due.AGAIN)
async def closed_at_select_by_a_crash(room: Room) -> None:
    await room.fault("close_at", step="select", code=4015)
    await room.ask_to_join()
    await room.renewed()


@case(Due.ASKED)
async def closed_at_speaking(room: Room) -> None:
    await room.fault("close_at", step="speaking", code=4006)
    await room.ask_to_join()
    await room.renewed()


@case(Due.RESUMED)
async def closed_at_speaking_by_a_crash(room: Room) -> None:
    await room.fault("close_at", step="speaking", code=4015)
    await room.play()
    await room.resumed()


@case(Due.RESUMED)
async def closed_at_heartbeat_by_a_crash(room: Room) -> None:
    await room.fault("close_at", step="heartbeat", code=4015)
    await room.play()
    await room.resumed()


@case(Due.ASKED)
async def closed_at_resume(room: Room) -> None:
    await room.play()
    await room.fault("close_at", step="resume", code=4006)
    await room.fault("drop")
    await room.renewed()


@case(Due.RESUMED)
async def credentials_good_for_one_session_resumed(room: Room) -> None:
    """Who has a session is to resume it: an Identify with the same credentials would be refused."""
    await room.fault("credentials_once")
    await room.play()
    await room.fault("hello_late", ms=1_000)
    await room.fault("drop")
    await room.resumed()


@case(Due.ASKED)
async def credentials_good_for_one_session_spent(room: Room) -> None:
    """The session ends before it stands, and they are good for no other one."""
    await room.fault("credentials_once")
    await room.fault("close_at", step="ready", code=4015)
    await room.ask_to_join()
    await room.renewed()


@case(Due.ASKED, kind="stage")
async def resumed_too_late_for_what_was_missed(room: Room) -> None:
    """The server keeps a thousand messages; more came while we were away."""
    await room.play()
    await room.fault("hello_late", ms=1_500)
    await room.fault("drop")
    await room.stack.discord.ghosts(room.guild, CROWD)
    await room.renewed()


@case(Due.RESUMED)
async def closed_normally(room: Room) -> None:
    """1000 is said without a reason, too."""
    await room.play()
    await room.fault("close", code=1000)
    await room.resumed()


@case(Due.ASKED)
async def closed_normally_for_good(room: Room) -> None:
    await room.play()
    await room.fault("close_at", step="resume", code=4006)
    await room.fault("close", code=1000)
    await room.renewed()


@case(Due.RESUMED)
async def the_edge_is_away(room: Room) -> None:
    """For longer than any number of tries would last."""
    await room.play()
    await room.fault("away", ms=8_000)
    await room.fault("drop")
    await room.resumed()


@case(Due.RESUMED)
async def nobody_listens_at_the_port(room: Room) -> None:
    await room.play()
    await room.fault("away", ms=8_000, how="refused")
    await room.fault("drop")
    await room.resumed()


@case(Due.NOTHING)
async def the_edge_is_away_at_the_join(room: Room) -> None:
    await room.fault("away", ms=2_000)
    await room.play()


@case(Due.NOTHING)
async def sent_elsewhere(room: Room) -> None:
    """A redirect is not followed: the server that was named is asked again."""
    await room.fault("redirect", to="http://127.0.0.1:9/")
    await room.play()


@case(Due.RESUMED)
async def numbers_wrap_around_a_resume(room: Room) -> None:
    """Messages are numbered 65535, 0, 1 ..; some before, some while we are away, some after."""
    await room.fault("first_seq", seq=65_520)
    await room.play()
    await room.heard_by(await room.join_member())
    await room.fault("hello_late", ms=1_500)
    await room.fault("drop")
    newcomer = await room.join_member()
    await room.resumed()
    await room.heard_by(newcomer)


@case(Due.RESUMED)
async def heartbeats_without_an_answer(room: Room) -> None:
    """A dead server is noticed by its silence; the interval is short here, so that it takes seconds."""
    await room.fault("hello_interval", ms=1_000)
    await room.play()
    await room.fault("no_ack")
    await room.until(lambda row: row.sessions[-1].resumed > 0, "a resume")
    await room.fault("no_ack", on=False)
    await room.hear_more()


@case(Due.NOTHING)
async def heartbeat_of_the_server(room: Room) -> None:
    await room.play()
    before = await room.look()
    await room.fault("server_heartbeat")
    await room.until(lambda row: row.sessions[-1].heartbeats > before.sessions[-1].heartbeats, "an answer at once")


@case(Due.ASKED)
async def kicked_and_asked_back(room: Room) -> None:
    """4014 with void credentials; the bot says where it is."""
    await room.play()
    await room.fault("kick", code=4014)
    await room.renewed()


@case(Due.ASKED)
async def call_terminated_and_begun_again(room: Room) -> None:
    await room.play()
    await room.fault("kick", code=4022)
    await room.renewed()


@case(Due.FAILED, code="kicked")
async def kicked_for_good(room: Room) -> None:
    """4014, and the bot does not answer: that is for `guild.join` to undo."""
    await room.play()
    await room.fault("kick", code=4014)


@case(Due.NOTHING)
async def messages_that_cannot_be_read(room: Room) -> None:
    """What makes no sense is passed over, and counted, and neither sequence nor group suffer."""
    await room.play()
    for text in UNREADABLE_TEXTS:
        await room.fault("say", text=text, n=10)
    for data in UNREADABLE_BYTES:
        await room.fault("say", data=data, n=10)
    await room.hear_more()


@case(Due.NOTHING)
async def a_flood_of_garbage(room: Room) -> None:
    await room.play()
    for _ in range(5):
        await room.fault("say", text=UNREADABLE_TEXTS[0], n=1_000)
        await room.fault("say", data=UNREADABLE_BYTES[0], n=100)
        await room.hear_more(SECOND // 5)


@case(Due.AGAIN)
async def a_flood_of_users(room: Room) -> None:
    """Thousands of new ids in each message: the session ends with a code, and no other guild hears of it."""
    await room.play()
    for number in range(13):  # one more than are allowed
        first = 10**18 + number * 10**6
        ids = ",".join(f'"{user}"' for user in range(first, first + 4_000))
        await room.fault("say", text='{"op":11,"d":{"user_ids":[' + ids + "]}}")
    await room.stack.wait_event("guild.failed", guild=room.guild, code="voice_flooded", within_s=SETTLED_WITHIN_S)
    await room.renewed()


@case(Due.RESUMED)
async def a_message_of_a_megabyte(room: Room) -> None:
    """Larger than any honest one: the WebSocket is closed with 1009, the session goes on."""
    await room.play()
    await room.fault("say", text='{"op":5,"d":"' + "x" * (1 << 20) + '"}')
    await room.resumed()


# the way of sound


@case(Due.NOTHING, voided=20 * SECOND)
async def sound_vanishes_for_a_while(room: Room) -> None:
    """The WebSocket lives, and nothing comes back: that is told, and is over when the server answers again."""
    await room.play()
    await room.fault("path", how="swallow")
    await room.told("reconnecting", "udp_lost")
    await room.fault("path", how="open")
    await room.hear_more()


@case(Due.AGAIN, voided=30 * SECOND)
async def sound_vanishes_on_this_way(room: Room) -> None:
    """What does not come back is left: a new session, from another port."""
    await room.play()
    await room.fault("path", how="swallow")
    await room.told("failed", "udp_lost")
    await room.fault("path", how="open")
    await room.renewed()


@case(Due.NOTHING, voided=10 * SECOND)
async def sound_is_refused_for_a_while(room: Room) -> None:
    await room.play()
    await room.fault("path", how="refuse")
    await room.told("reconnecting", "udp_refused")
    await room.fault("path", how="open")
    await room.hear_more()


@case(Due.NOTHING)
async def pings_are_not_answered(room: Room) -> None:
    """A server that never did may be one that does not."""
    await room.fault("ping_silent")
    await room.play(17 * SECOND)


# the handshake


@case(Due.FAILED, code="udp_blocked")
async def discovery_unanswered(room: Room) -> None:
    await room.fault("discovery_silent")
    await room.ask_to_join()


@case(Due.NOTHING)
async def discovery_answered_at_the_third_time(room: Room) -> None:
    await room.fault("discovery_lose_first", n=2)
    await room.play()


@case(Due.NOTHING)
async def discovery_answered_with_another_type(room: Room) -> None:
    await room.fault("discovery_wrong", response="type")
    await room.play()


@case(Due.NOTHING)
async def discovery_answered_for_a_foreign_ssrc(room: Room) -> None:
    await room.fault("discovery_wrong", response="ssrc")
    await room.play()


@case(Due.NOTHING)
async def discovery_answered_in_70_bytes(room: Room) -> None:
    await room.fault("discovery_wrong", response="legacy")
    await room.play()


@case(Due.NOTHING)
async def discovery_tells_another_port(room: Room) -> None:
    """A NAT in between: what was told is selected, and not the local port."""
    await room.fault("discovery_wrong", response="port")
    await room.play()


@case(Due.NOTHING)
async def only_xchacha_offered(room: Room) -> None:
    await room.fault("modes", modes=[XCHACHA])
    row = await room.play()
    assert row.sessions[-1].mode == XCHACHA


@case(Due.NOTHING)
async def unknown_modes_offered_first(room: Room) -> None:
    await room.fault("modes", modes=["aead_tomorrow", "", XCHACHA, AES])
    row = await room.play()
    assert row.sessions[-1].mode == AES


@case(Due.FAILED, code="voice_mode_unsupported")
async def no_known_mode_offered(room: Room) -> None:
    await room.fault("modes", modes=["aead_tomorrow", "aead_next_week"])
    await room.ask_to_join()


@case(Due.FAILED, code="voice_mode_unsupported")
async def no_mode_offered(room: Room) -> None:
    await room.fault("modes", modes=[])
    await room.ask_to_join()


@case(Due.FAILED, code="voice_closed")
async def only_a_discontinued_mode_offered(room: Room) -> None:
    """It is chosen, for want of a better one, and refused: no server speaks it any more, this one included."""
    await room.fault("modes", modes=["xsalsa20_poly1305_lite"])
    await room.ask_to_join()
    await room.stack.wait_event("guild.failed", guild=room.guild, close_code=4016, final=True)


@case(Due.NOTHING, voided=2 * BUILT_AHEAD)
async def a_new_key(room: Room) -> None:
    """Op 4 again: the counter begins anew, under a key of its own."""
    await room.play()
    await room.fault("new_key")
    await room.hear_more()
    await room.fault("new_key")
    await room.hear_more()
