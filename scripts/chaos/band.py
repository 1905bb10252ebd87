"""The bands of chaos.py: members who play, chat, come and go."""

import random
from collections.abc import Callable, Iterator
from itertools import count

import trio

from scripts.chaos.judge import Message, Record
from scripts.chaos.player import Player

_HURRY = 10
_TEMPI = (60, 92, 120, 138, 174)


class Band:
    """The members of one session, the first of whom leads at first.

    Args:
        seed: for what they play, and when.

    Attributes:
        leader: who leads now.
        storm: give commands without a break, so that some are on their way whenever a fault comes.
        guests: everybody who was here for a while, too.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        port: int,
        session: str,
        members: int,
        seed: str,
        notice: Callable[[float, Message], None],
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
    def records(self) -> Iterator[Record]:
        """Of all connections that its members ever had."""
        for player in (*self.players, *self.guests):
            yield from player.records

    async def join(self) -> None:
        """Everybody joins, or comes back, one after the other."""
        for player in self.players:
            await player.join()

    async def play(self) -> None:
        """Play until `stop`; then every command has its answer."""
        self._stopping = trio.Event()
        async with trio.open_nursery() as clocks:
            for player in self.players:
                clocks.start_soon(player.keep_time)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._lead)
                for player in self.players[1:]:
                    nursery.start_soon(self._chat, player)
                nursery.start_soon(self._visit)
            clocks.cancel_scope.cancel()

    def stop(self) -> None:
        """Come to an end."""
        self._stopping.set()

    async def go_home(self) -> None:
        """Close all connections."""
        for player in (*self.players, *self.guests):
            await player.disconnect()

    async def _lead(self) -> None:
        draw = self._random
        await self.leader.ask("play", positionMs=0)
        while await self._pause(0.02, 0.15):
            at = draw.choice(["now", "beat", "bar"])
            position = draw.randrange(600_000)
            match draw.choices(
                ["play", "pause", "seek", "tempo", "message", "lead"], [4, 1, 3, 3, 4, 0.3]
            )[0]:
                case "play":
                    await self.leader.ask("play")
                case "pause":
                    await self.leader.ask("pause")
                case "seek":
                    await self.leader.ask("seek", positionMs=position, at=at)
                case "tempo":
                    await self.leader.ask("set_tempo", tempoBpm=draw.choice(_TEMPI), at=at)
                case "message":
                    await self.leader.ask("update_message", message=next(self._words))
                case "lead":
                    await self._hand_over()

    async def _hand_over(self) -> None:
        heir = self._random.choice([p for p in self.players if p is not self.leader] or [None])
        if heir is None:
            return
        asked = await self.leader.ask("set_role", role="leader", memberId=heir.member_id)
        if asked.acked:
            self.leader.role, heir.role = "follower", "leader"
            self.leader = heir

    async def _chat(self, player: Player) -> None:
        while await self._pause(0.02, 0.3):
            await player.ask("chat_message", text=next(self._words))

    async def _visit(self) -> None:
        """A guest comes, loses the network, comes back and leaves, again and again."""
        for number in count(1):
            if not await self._pause(0.3, 1.0, calm=True):
                return
            guest = Player(self._nursery, self._port, self.session, f"guest{number}")
            self.guests.append(guest)
            await guest.join()
            await guest.ask("chat_message", text=next(self._words))
            await guest.disconnect()
            await self._pause(0.0, 0.5, calm=True)
            await guest.join()
            await self._pause(0.0, 0.5, calm=True)
            await guest.leave()

    async def _pause(self, least_s: float, most_s: float, *, calm: bool = False) -> bool:
        """Wait a little; False when it is time to stop.

        Args:
            calm: in a storm, too.
        """
        hurry = _HURRY if self.storm and not calm else 1
        with trio.move_on_after(self._random.uniform(least_s, most_s) / hurry):
            await self._stopping.wait()
        return not self._stopping.is_set()
