"""A client's replica of a session, built from its messages, to compare with snapshots. No I/O."""

from scripts.chaos.records import CHAT_RING, EVENTS
from scripts.testbed.json_messages import JsonMessage, JsonTransport


class SessionReplica:
    """A session, as one connection knows it: the last snapshot and the events after it.

    Attributes:
        epoch: of the last snapshot; empty before.
        version: of the last event.
        leader: member id of the leader; empty while there is none.
        message: the headline.
        transport: the song's transport; None before the first snapshot.
        members: whether each member is connected, by id.
        chat: ids of the messages in the ring.
    """

    def __init__(self) -> None:
        self.epoch = ""
        self.version = 0
        self.leader = ""
        self.message = ""
        self.transport: JsonTransport | None = None
        self.members: dict[str, bool] = {}
        self.chat: list[str] = []

    def content(self) -> dict[str, object]:
        """All parts but the version."""
        return {
            "leader": self.leader,
            "message": self.message,
            "transport": self.transport,
            "members": self.members,
            "chat": self.chat,
        }

    def apply(self, message: JsonMessage) -> str | None:
        """Apply a message. Return its difference, if it is a snapshot of the same version."""
        if message["type"] == "snapshot":
            other = SessionReplica()
            other._replace(message)
            same = (other.epoch, other.version) == (self.epoch, self.version)
            own, other_content = self.content(), other.content()
            self._replace(message)
            if same and own != other_content:
                differ = [
                    f"{p}: {own[p]} / {other_content[p]}" for p in own if own[p] != other_content[p]
                ]
                return f"replica / snapshot at version {self.version}: {'; '.join(differ)}"
        elif message["type"] in EVENTS:
            self._apply_event(message)
        return None

    def _replace(self, snapshot: JsonMessage) -> None:
        self.epoch, self.version = snapshot["epoch"], snapshot["version"]
        self.leader = snapshot["leaderId"] or ""
        self.message = snapshot["message"]
        self.transport = snapshot["transport"]
        self.members = {m["memberId"]: m["connected"] for m in snapshot["members"]}
        self.chat = [chat["messageId"] for chat in snapshot["chat"]]

    def _apply_event(self, event: JsonMessage) -> None:
        self.version = event["version"]
        self.transport = event.get("transport", self.transport)
        match event["type"]:
            case "user_joined":
                member = event["member"]
                self.members[member["memberId"]] = member["connected"]
                if member["role"] == "leader":
                    self.leader = member["memberId"]
            case "user_left":
                self.members.pop(event["memberId"], None)
                if self.leader == event["memberId"]:
                    self.leader = ""
            case "member_connection":
                self.members[event["memberId"]] = event["connected"]
            case "role_changed":
                if event["role"] == "leader":
                    self.leader = event["memberId"]
                elif self.leader == event["memberId"]:
                    self.leader = ""
            case "message_updated":
                self.message = event["message"]
            case "chat_message":
                self.chat = [*self.chat, event["messageId"]][-CHAT_RING:]
