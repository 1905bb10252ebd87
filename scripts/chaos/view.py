"""What a client makes of what it hears, to be compared with what it is shown. No I/O."""

from collections.abc import Mapping
from typing import Any

from scripts.chaos.judge import CHAT_RING, EVENTS, Message


class View:
    """A session, as one connection knows it: the last snapshot and the events after it.

    Attributes:
        leader: empty while nobody leads.
    """

    def __init__(self) -> None:
        self.epoch = ""
        self.version = 0
        self.leader = ""
        self.message = ""
        self.transport: Mapping[str, Any] = {}
        self.members: dict[str, bool] = {}
        self.chat: list[str] = []

    def content(self) -> dict[str, object]:
        """All of it but the version."""
        return {
            "leader": self.leader,
            "message": self.message,
            "transport": self.transport,
            "members": self.members,
            "chat": self.chat,
        }

    def hear(self, message: Message) -> str | None:
        """Take a message; what is wrong with a snapshot that shows another state than is known."""
        if message["type"] == "snapshot":
            shown = View()
            shown._show(message)
            same = (shown.epoch, shown.version) == (self.epoch, self.version)
            ours, theirs = self.content(), shown.content()
            self._show(message)
            if same and ours != theirs:
                differ = [f"{p}: {ours[p]} / {theirs[p]}" for p in ours if ours[p] != theirs[p]]
                return f"heard / shown at version {self.version}: {'; '.join(differ)}"
        elif message["type"] in EVENTS:
            self._follow(message)
        return None

    def _show(self, snapshot: Message) -> None:
        self.epoch, self.version = snapshot["epoch"], snapshot["version"]
        self.leader = snapshot["leaderId"] or ""
        self.message = snapshot["message"]
        self.transport = snapshot["transport"]
        self.members = {m["memberId"]: m["connected"] for m in snapshot["members"]}
        self.chat = [chat["messageId"] for chat in snapshot["chat"]]

    def _follow(self, event: Message) -> None:
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
