"""A BandSync client for programs on Trio; `bandsync.js` is its counterpart in the browser.

```python
import trio
from bandsync import client
from bandsync.wire.messages import TempoChanged


async def main() -> None:
    async with client.connect("ws://127.0.0.1:3001", "our-song", display_name="Ann") as band:
        await band.play(count_in_beats=4)
        async for event in band.events():
            match event:
                case TempoChanged(new_tempo_bpm=bpm):
                    print(f"{bpm} BPM from beat {band.beat_at():.1f} on")


trio.run(main)
```

`connect` keeps the connection: it resumes by itself, keeps the session clock, and requests missed
versions. `Band` has the commands and the current state. The events are the structs of
`bandsync.wire.messages` and a few of the client's own. `bandsync.client.exceptions` draws the tree
of exceptions.
"""

from bandsync.client.band import Band, connect
from bandsync.client.conversation import Tap
from bandsync.client.events import BandEvent, EventsDropped, EventStream, Status, StatusChanged
from bandsync.client.exceptions import (
    ClientError,
    CommandRefused,
    ConnectionLost,
    Ended,
    JoinRefused,
    NotConnected,
    Superseded,
    Unreachable,
)
from bandsync.client.inbound import UnknownMessage
from bandsync.client.membership import Token
from bandsync.client.server_address import OpenStream
from bandsync.client.session_clock import SessionClock
from bandsync.client.view import SessionView

__all__ = [
    "Band",
    "BandEvent",
    "ClientError",
    "CommandRefused",
    "ConnectionLost",
    "Ended",
    "EventStream",
    "EventsDropped",
    "JoinRefused",
    "NotConnected",
    "OpenStream",
    "SessionClock",
    "SessionView",
    "Status",
    "StatusChanged",
    "Superseded",
    "Tap",
    "Token",
    "UnknownMessage",
    "Unreachable",
    "connect",
]
