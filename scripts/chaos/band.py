"""A band of a chaos run: the members of one session, who play, chat, join and leave."""

import random
from collections.abc import Callable, Iterator
from itertools import count

import trio

from scripts.chaos.player import Player
from scripts.chaos.records import ConnectionRecord
from scripts.testbed.json_messages import JsonMessage

_STORM_SPEED_UP = 10
_TEMPI = (60, 92, 120, 138, 174)


class ChaosBand:
    """The members of one session. The first one leads at first.

    Args:
        nursery: runs their connections.
        port: of the server.
        session: id of the session.
        members: their number.
        seed: for the commands and their times.
        notice: as for a `Player`.

    Attributes:
        session: id of the session.
        players: the members who stay for the whole run.
        leader: the member who leads now.
        storm: send commands ten times as fast, so that some are in flight when a fault begins.
        guests: members who joined for a while.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        port: int,
        session: str,
        members: int,
        seed: str,
        notice: Callable[[float, JsonMessage], None],
    ) -> None:
        self.session = session
        self.players = [
            Player(nursery, port, session, f"p{n}", foreign=n % 2 == 0, notice=notice)
            for n in range(members)
        ]
        self.leader = self.players[0]
        self.storm = False
        self.guests: list[Player] = []
        self._nursery = nursery
        self._port = port
        self._random = random.Random(seed)  # noqa: S311  # a seed to repeat a run
        self._stopping = trio.Event()
        self._words = (f"{session} {number}" for number in count(1))

    @property
    def records(self) -> Iterator[ConnectionRecord]:
        """The records of all connections that its members ever had."""
        for player in (*self.players, *self.guests):
            yield from player.records

    async def join(self) -> None:
        """Let all members join or resume, one after the other."""
        for player in self.players:
            await player.join()

    async def play(self) -> None:
        """Send commands until `stop`; return when every command has its reply."""
        self._stopping = trio.Event()
        async with trio.open_nursery() as clocks:
            for player in self.players:
                clocks.start_soon(player.keep_time)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._lead)
                for player in self.players[1:]:
                    nursery.start_soon(self._chat, player)
                nursery.start_soon(self._guests_come_and_go)
            clocks.cancel_scope.cancel()

    def stop(self) -> None:
        """End `play`."""
        self._stopping.set()

    async def disconnect(self) -> None:
        """Close all connections."""
        for player in (*self.players, *self.guests):
            await player.disconnect()

    async def _lead(self) -> None:
        draw = self._random
        await self.leader.request("play", positionMs=0)
        while await self._pause(0.02, 0.15):
            at = draw.choice(["now", "beat", "bar"])
            position = draw.randrange(600_000)
            match draw.choices(
                ["play", "pause", "seek", "tempo", "message", "lead"], [4, 1, 3, 3, 4, 0.3]
            )[0]:
                case "play":
                    await self.leader.request("play")
                case "pause":
                    await self.leader.request("pause")
                case "seek":
                    await self.leader.request("seek", positionMs=position, at=at)
                case "tempo":
                    await self.leader.request("set_tempo", tempoBpm=draw.choice(_TEMPI), at=at)
                case "message":
                    await self.leader.request("update_message", message=next(self._words))
                case "lead":
                    await self._hand_over()

    async def _hand_over(self) -> None:
        successor = self._random.choice([p for p in self.players if p is not self.leader] or [None])
        if successor is None:
            return
        handed_over = await self.leader.request(
            "set_role", role="leader", memberId=successor.member_id
        )
        if handed_over.acked:
            self.leader.role, successor.role = "follower", "leader"
            self.leader = successor

    async def _chat(self, player: Player) -> None:
        while await self._pause(0.02, 0.3):
            await player.request("chat_message", text=next(self._words))

    async def _guests_come_and_go(self) -> None:
        """Let guests join, lose the network, resume and leave, one after the other."""
        for number in count(1):
            if not await self._pause(0.3, 1.0, ignore_storm=True):
                return
            guest = Player(self._nursery, self._port, self.session, f"guest{number}")
            self.guests.append(guest)
            await guest.join()
            await guest.request("chat_message", text=next(self._words))
            await guest.disconnect()
            await self._pause(0.0, 0.5, ignore_storm=True)
            await guest.join()
            await self._pause(0.0, 0.5, ignore_storm=True)
            await guest.leave()

    async def _pause(self, least_s: float, most_s: float, *, ignore_storm: bool = False) -> bool:
        """Wait a random time; return False when it is time to stop.

        Args:
            least_s: shortest wait.
            most_s: longest wait.
            ignore_storm: wait as long during a storm.
        """
        speed_up = _STORM_SPEED_UP if self.storm and not ignore_storm else 1
        with trio.move_on_after(self._random.uniform(least_s, most_s) / speed_up):
            await self._stopping.wait()
        return not self._stopping.is_set()
