"""A band on one server over real sockets, with a client library that is not ours."""

import jwt
import pytest
import trio

from tests.support.servers import Server, band, musician, start_server

COMMON = {"sessionId", "version", "serverTime", "type"}


async def test_welcome(server: Server) -> None:
    async with musician(server) as player:
        (welcome,) = player.all("welcome")
    assert welcome.pop("serverTime") > 1.7e12
    assert len(welcome.pop("connectionId")) >= 8
    assert welcome == {
        "type": "welcome",
        "protocol": 1,
        "serverId": "stage",
        "storageType": "memory",
        "pingIntervalMs": 5000,
        "limits": {
            "maxMessageBytes": 16384,
            "maxMembers": 8,
            "minTempoBpm": 20.0,
            "maxTempoBpm": 300.0,
        },
    }


async def test_eight_members_rehearse_a_song(server: Server) -> None:
    names = [f"Member {number}" for number in range(8)]
    async with band(server, *names) as players:
        leader, *others = players
        assert leader.you["role"] == "leader"
        assert {player.you["role"] for player in others} == {"follower"}
        await leader.ok("set_tempo", tempoBpm=90, beatsPerBar=3)
        await leader.ok("play", positionMs=0)
        await leader.ok("seek", positionMs=30_000, at="bar")
        await leader.ok("update_message", message="Da capo")
        for player in others:
            await player.ok("chat_message", text="Ready!")
        await leader.ok("set_role", role="leader", memberId=others[0].you["memberId"])
        assert (await leader.ask("pause"))["code"] == "not_leader"
        final = (await others[0].ok("stop"))["version"]
        for player in players:
            await player.next("stop")
        transports = [player.all("stop")[0]["transport"] for player in players]
        assert transports == [transports[0]] * 8
        for index, player in enumerate(players):
            versions = [
                message["version"]
                for message in player.inbox
                if "version" in message
                and message.keys() >= COMMON
                and message["type"] not in {"snapshot", "sync_response", "ack"}
            ]
            # One for each change after its own join.
            assert versions == list(range(index + 2, final + 1))


async def test_sessions_are_isolated(server: Server) -> None:
    async with (
        band(server, "Ann", "Bob", session="one") as one,
        band(server, "Cid", "Dan", session="two") as two,
    ):
        await one[0].ok("chat_message", text="for one")
        await two[0].ok("chat_message", text="for two")
        await one[1].next("chat_message", text="for one")
        await two[1].next("chat_message", text="for two")
        heard = {
            message["sessionId"]
            for player in one
            for message in player.inbox
            if "sessionId" in message
        }
        assert heard == {"one"}


async def test_a_session_id_in_the_path_is_the_default(server: Server) -> None:
    async with musician(server, "/ws/our%2Dsong?x=1") as player:
        assert (await player.join(None))["sessionId"] == "our-song"
    async with musician(server, "/ws") as player:
        answer = await player.ask("join_session")
        assert (answer["code"], answer["context"]) == ("invalid_field", {"field": "sessionId"})
    async with musician(server, "/ws/no%20good") as player:
        assert (await player.ask("join_session"))["code"] == "invalid_field"
        assert (await player.join("good"))["sessionId"] == "good"


async def test_snapshot_of_a_new_session(server: Server) -> None:
    async with musician(server) as player:
        snapshot = await player.join("new", displayName="Ann")
        you = snapshot["you"]
        (member,) = snapshot["members"]
        assert member == {
            "memberId": you["memberId"],
            "displayName": "Ann",
            "role": "leader",
            "joinedAt": snapshot["createdAt"],
            "connected": True,
            "serverId": "stage",
        }
        assert snapshot["version"] == 1
        assert snapshot["transport"] == {
            "isPlaying": False,
            "positionMs": 0.0,
            "anchorTime": snapshot["createdAt"],
            "tempoBpm": 120.0,
            "beat": 0.0,
            "beatsPerBar": 4,
            "next": None,
        }
        expected = {
            "tempo": 120.0,
            "tempoBpm": 120.0,
            "position": 0.0,
            "isPlaying": False,
            "message": "",
            "chat": [],
            "settings": {"maxMembers": 8},
            "leaderId": you["memberId"],
        }
        assert expected.items() <= snapshot.items()
        assert you["role"] == "leader"
        assert you["resumed"] is False
        stats = await player.next("room_stats")
        assert stats["members"][0]["quality"] in {"unknown", "excellent"}


async def test_ticks_are_sent_while_playing_unless_declined(server: Server) -> None:
    async with musician(server) as leader, musician(server) as quiet:
        await leader.join()
        await quiet.join(ticks=False)
        await leader.ok("play")
        first = await leader.next("scroll_tick")
        second = await leader.next("scroll_tick")
        moved = second["positionMs"] - first["positionMs"]
        assert moved == pytest.approx(second["serverTime"] - first["serverTime"], abs=0.01)
        assert second["beat"] == pytest.approx(second["positionMs"] * 120 / 60_000, abs=1e-5)
        await leader.ok("pause")
        await quiet.next("pause")
        assert quiet.all("scroll_tick") == []


async def test_resume_gives_back_member_and_role(server: Server) -> None:
    async with band(server, "Ann", "Bob") as (_, bob), musician(server) as first:
        snapshot = await first.join(displayName="Cid")
        await first.socket.aclose()
        gone = await bob.next("member_connection", connected=False)
        assert gone["memberId"] == snapshot["you"]["memberId"]
        async with musician(server) as again:
            resumed = await again.join(resumeToken=snapshot["you"]["resumeToken"])
            assert resumed["you"]["resumed"] is True
            assert resumed["you"]["memberId"] == snapshot["you"]["memberId"]
            assert resumed["you"]["resumeToken"] != snapshot["you"]["resumeToken"]
            await bob.next("member_connection", connected=True)
            # The answer to a resume may be lost with the network: the token before still works.
            async with musician(server) as third:
                resumed = await third.join(resumeToken=snapshot["you"]["resumeToken"])
                assert resumed["you"]["memberId"] == snapshot["you"]["memberId"]
                assert await again.closed() == 4001
                await third.ok("chat_message", text="still here")
        assert bob.all("user_left") == []


async def test_the_leader_resumes_as_leader(server: Server) -> None:
    async with band(server, "Bob") as (bob,), musician(server) as first:
        await first.join(displayName="Ann")
        await bob.ok("set_role", role="leader", memberId=first.you["memberId"])
        await first.socket.aclose()
        await bob.next("member_connection", connected=False)
        async with musician(server) as again:
            assert (await again.join(resumeToken=first.you["resumeToken"]))["you"][
                "role"
            ] == "leader"
            await again.ok("play")


@pytest.mark.parametrize(
    "token", ["", "x", "a.b.c", "{}.1.guess", "{}.1", "é.1.é", "{}.9", "{}.-1."]
)
async def test_unknown_tokens_join_anew(server: Server, token: str) -> None:
    async with band(server, "Ann") as (ann,), musician(server) as player:
        you = (await player.join(resumeToken=token.format(ann.you["memberId"])))["you"]
        assert you["resumed"] is False
        assert you["memberId"] != ann.you["memberId"]


async def test_second_join_resumes_the_member(server: Server) -> None:
    async with band(server, "Ann") as (ann,), musician(server) as player:
        first = (await player.join())["you"]
        second = (await player.join())["you"]
        assert second["memberId"] == first["memberId"]
        assert second["resumed"] is True
        assert len((await player.join())["members"]) == 2
        assert ann.all("user_left") == []


async def test_joining_another_session_leaves_the_first(server: Server) -> None:
    async with band(server, "Ann") as (ann,), musician(server) as player:
        await player.join("song")
        there = (await player.join("other"))["you"]
        left = await ann.next("user_left")
        assert left["reason"] == "left"
        assert left["memberCount"] == 1
        assert there["role"] == "leader"
        await ann.ok("chat_message", text="gone?")
        await player.ok("play")
        assert player.all("chat_message") == []


async def test_leave(server: Server) -> None:
    async with band(server, "Ann", "Bob") as (ann, bob):
        await ann.ok("leave_session")
        assert (await bob.next("user_left"))["memberId"] == ann.you["memberId"]
        changed = await bob.next("role_changed")
        assert (changed["memberId"], changed["reason"]) == (bob.you["memberId"], "elected")
        assert (await ann.ask("play"))["code"] == "not_joined"
        assert (await ann.join())["you"]["role"] == "follower"


async def test_full_session_refuses_joins(nursery: trio.Nursery) -> None:
    server = await start_server(nursery, max_members=2)
    async with band(server, "Ann", "Bob") as (ann, _), musician(server) as third:
        assert (await third.ask("join_session", sessionId="song"))["code"] == "session_full"
        assert (await third.join("elsewhere"))["sessionId"] == "elsewhere"
        assert (await third.ask("join_session", sessionId="song"))["code"] == "session_full"
        await third.ok("play")  # Still where it was.
        assert ann.all("user_left") == []
    await server.stop()


async def test_a_session_outlives_its_members(server: Server) -> None:
    async with band(server, "Ann") as (ann,):
        epoch = ann.all("snapshot")[0]["epoch"]
        await ann.ok("set_tempo", tempo=77)
        await ann.ok("chat_message", text="see you")
        await ann.ok("leave_session")
        snapshot = await ann.join()
        assert (snapshot["epoch"], snapshot["tempo"], snapshot["version"]) == (epoch, 77.0, 5)
        assert [chat["text"] for chat in snapshot["chat"]] == ["see you"]


async def test_clock_exchanges(server: Server) -> None:
    async with musician(server) as player:
        await player.send("clock_sync", t0=12345678901234567)
        reply = await player.next("clock_sync")
        assert reply["t0"] == 12345678901234567
        assert reply["t1"] <= reply["t2"]
        await player.send("latency_probe", timestamp=-1.5)
        assert (await player.next("latency_response"))["clientTimestamp"] == -1.5
        await player.ok("heartbeat")
        await player.next("heartbeat")


async def test_drift_of_a_follower_and_sync(server: Server) -> None:
    async with band(server, "Ann", "Bob") as (ann, bob):
        await ann.ok("play", startInMs=0)
        anchor = (await bob.next("play"))["transport"]["anchorTime"]
        await bob.ok("position_sync", positionMs=10, timestamp=anchor)
        await bob.ok("position_sync", positionMs=900, timestamp=anchor)
        drift = await bob.next("drift_correction")
        assert drift["driftMs"] == pytest.approx(900, abs=0.001)
        await ann.ok("position_sync", positionMs=500, timestamp=anchor)
        moved = await bob.next("position_sync")
        assert moved["by"] == ann.you["memberId"]
        answer = await bob.ask("position_sync", positionMs=0, timestamp=anchor + 60_000)
        assert answer["context"] == {"field": "timestamp"}
        version = moved["version"]
        await bob.ok("sync_request", version=version)
        assert (await bob.next("sync_response"))["version"] == version
        await bob.ok("sync_request", version=version - 1)
        assert (await bob.next("snapshot"))["version"] == version


async def test_leader_receives_and_denies_a_request(server: Server) -> None:
    async with band(server, "Ann", "Bob") as (ann, bob):
        assert (await bob.ask("set_role", role="leader"))["code"] == "leader_present"
        await bob.ok("request_leader")
        asked = await ann.next("leader_requested")
        assert (asked["memberId"], asked["displayName"]) == (bob.you["memberId"], "Bob")
        await ann.ok("deny_leader", memberId=bob.you["memberId"])
        assert (await bob.next("leader_denied"))["displayName"] == "Ann"
        assert (await ann.ask("deny_leader", memberId="nobody"))["code"] == "not_member"


async def test_sync_errors_are_shown_to_the_band(server: Server) -> None:
    async with band(server, "Ann", "Bob") as (ann, bob):
        await bob.ok("sync_report", errorMs=1.25)
        async with musician(server) as third:
            await third.join()
            stats = await third.next("room_stats")
        shown = {member["memberId"]: member["syncErrorMs"] for member in stats["members"]}
        assert shown[bob.you["memberId"]] == 1.25
        assert shown[ann.you["memberId"]] is None


async def test_joins_with_tokens(nursery: trio.Nursery) -> None:
    secret = "a secret of thirty-two characters"
    server = await start_server(nursery, join_secret=secret)

    def token(**claims: object) -> str:
        return jwt.encode({"sub": "u1", "session": "song", "exp": 4e9, **claims}, secret)

    async with musician(server) as player:
        refused = [
            {},
            {"token": "x"},
            {"token": token(session="other")},
            {"token": token(exp=1)},
            {"token": token(exp=None)},
            {"token": jwt.encode({"sub": "u", "session": "song", "exp": 4e9}, "w" * 32)},
            {
                "token": jwt.encode(
                    {"sub": "u", "session": "song", "exp": 4e9}, "", algorithm="none"
                )
            },
        ]
        codes = []
        for fields in refused:
            async with musician(server) as other:
                codes.append((await other.ask("join_session", sessionId="song", **fields))["code"])
        assert codes == ["unauthorized"] * len(refused)
        snapshot = await player.join(token=token(name="Ann", aud="us"), displayName="Mallory")
        assert snapshot["members"][0]["displayName"] == "Ann"
    # An expired join token does not prevent a resume.
    async with musician(server) as again:
        snapshot = await again.join(token=token(exp=1), resumeToken=player.you["resumeToken"])
        assert snapshot["you"]["resumed"]
    await server.stop()


async def test_messages_before_a_join(server: Server) -> None:
    async with musician(server) as player:
        for type_, fields in {
            "play": {},
            "seek": {"positionMs": 1},
            "chat_message": {"text": "x"},
            "set_role": {"role": "leader"},
            "sync_request": {},
            "leave_session": {},
            "request_leader": {},
            "sync_report": {"errorMs": 1},
        }.items():
            assert (await player.ask(type_, **fields))["code"] == "not_joined", type_


async def test_silence_means_no_answer(server: Server) -> None:
    """Without a requestId there is no ack, and errors carry none."""
    async with musician(server) as player:
        await player.join()
        answers = len(player.all("ack"))
        await player.send("play")
        await player.send("seek", positionMs=-1)
        error = await player.next("error")
        assert "requestId" not in error
        assert len(player.all("play")) == 1
        assert len(player.all("ack")) == answers
