"""Types of decoded server messages, as far as benchmarks and chaos runs read them."""

from typing import TypedDict


class JsonTransport(TypedDict):
    """The `transport` of a message."""

    isPlaying: bool
    positionMs: float
    anchorTime: float
    tempoBpm: float
    beat: float
    beatsPerBar: int
    next: "JsonTransport | None"


class JsonMember(TypedDict):
    """A member in a snapshot."""

    memberId: str
    displayName: str
    role: str
    connected: bool


class JsonChat(TypedDict, total=False):
    """A chat message in a snapshot."""

    messageId: str
    text: str
    sentAt: float


class JsonYou(TypedDict):
    """The part of a snapshot for the member who joined."""

    memberId: str
    role: str
    resumed: bool
    resumeToken: str


class JsonMessage(TypedDict, total=False):
    """A message of the server, with the fields of all types; PROTOCOL.md describes them."""

    type: str
    requestId: str
    epoch: str
    version: int
    serverTime: float
    code: str
    message: str
    transport: JsonTransport
    leaderId: str | None
    members: list[JsonMember]
    chat: list[JsonChat]
    you: JsonYou
    member: JsonMember
    memberId: str
    role: str
    connected: bool
    reason: str
    positionMs: float
    messageId: str
    text: str
    sentAt: float
    t0: float
    t1: float
    t2: float
    isPlaying: bool
    reconnectInMs: float
    storageType: str
