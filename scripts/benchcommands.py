CHEAD

def command_frames() -> list[bytes]:
    """A cycle of leader's commands, each of which changes something."""
    frames: list[bytes] = []
    for turn in range(16):
        commands: list[dict[str, object]] = [
            {"type": "seek", "positionMs": 1000.0 * turn},
            {"type": "set_tempo", "tempoBpm": 100.0 + turn},
            {"type": "update_message", "message": f"Second verse, then the bridge ({turn})"},
            {"type": "pause" if turn % 2 else "play"},
        ]
        for command in commands:
            frames.append(masked({**command, "requestId": f"c{len(frames)}"}))
    return frames


def acked(data: bytes, start: int, end: int) -> int | None:
    """Which command of `command_frames` a frame of BandSync answers."""
    if data.startswith(b'{"type":"error"', start):
        raise BenchError(f"refused: {data[start:end].decode()}")
    if not data.startswith(_ACK, start):
        return None
    at = start + len(_ACK)
    return int(data[at + 1 : data.index(b'"', at, end)])


def commands(sessions: int, members: int, seconds: float) -> dict[str, object]:
    """Commands as fast as they are answered: BandSync beside a server that only broadcasts."""
    connections = sessions * members
    with ExitStack() as stack:
        server = stack.enter_context(bandsync(connections, members))
        fleet = stack.enter_context(Fleet(server.port))
        leaders = join(fleet, sessions, members)
        own = ClosedLoop(command_frames(), acked)
        for leader in leaders:
            own.add(leader)
        own.start()
        fleet.run_for(WARM_UP_S)
        own.stop(fleet)
        event_bytes = _event_bytes(fleet, leaders[0])

        plain = stack.enter_context(Server(__file__, "websockets"))
        plain_fleet = stack.enter_context(Fleet(plain.port))
        plain_leaders = plain_fleet.open(range(sessions))
        for _ in range(1, members):
            plain_fleet.open(range(sessions))
        plain_fleet.run_for(SETTLE_S)
        text = b'{"type":"yardstick","pad":"' + b"x" * (event_bytes - 29) + b'"}'
        echo = ClosedLoop([masked_text(text)], lambda data, start, end: -1)
        for leader in plain_leaders:
            echo.add(leader)
        settle()

        contenders = {
            "bandsync": Contender(server, fleet, wake=own.start, rest=lambda: own.stop(fleet)),
            "websockets": Contender(
                plain, plain_fleet, wake=echo.start, rest=lambda: echo.stop(plain_fleet)
            ),
        }
        windows = alternate(contenders, seconds)
    result: dict[str, object] = {
        "bench": "commands",
        "sessions": sessions,
        "members": members,
        "outstandingPerLeader": 2,
        "windowSeconds": round(seconds, 1),
        "slices": len(windows["websockets"]),
        "eventBytes": event_bytes,
    }
    rates: dict[str, float] = {}
    for name, parts in windows.items():
        whole = total(parts)
        deliveries = whole.frames(without=_NO_EVENTS)
        rates[name] = _event_rate(whole)
        result[name] = {
            "deliveriesPerSecond": round(rates[name]),
            "perSlice": [round(_event_rate(part)) for part in parts],
            "cpuUsPerDelivery": round(cpu_us(whole, deliveries), 2),
            "otherFramesPerSecond": round((whole.frames() - deliveries) / whole.seconds),
            "serverCpu": round(whole.server_cpu_s / whole.seconds, 3),
            "generatorCpu": round(whole.generator_cpu_s / whole.seconds, 3),
        }
    return result | {
        "ratio": round(rates["bandsync"] / rates["websockets"], 2),
        "medianRatio": median_ratio(windows["bandsync"], windows["websockets"], _event_rate),
    }


def _event_rate(window: Window) -> float:
    return window.frames(without=_NO_EVENTS) / window.seconds


def _event_bytes(fleet: Fleet, leader: Client) -> int:
    """The mean size of the events that one turn of commands causes, bytes."""
    sizes: list[int] = []

    def note(data: bytes, start: int, end: int) -> None:
        if data[start + 9 : start + 13] not in _NO_EVENTS:
            sizes.append(end - start)

    previous, leader.on_text = leader.on_text, note
    # Eight: both play and pause, at whose end the song stands as it did.
    for frame in command_frames()[:8]:
        leader.send(frame)
    fleet.run_until(lambda: len(sizes) >= 8)
    fleet.run_for(SETTLE_S)
    leader.on_text = previous
    return round(sum(sizes) / len(sizes))


