"""The loss reasons of Redis in words that an operator understands during a concert."""

_WORDS = {
    "refused": "nothing answers at its address",
    "unreachable": "the network has no route to it",
    "reset": "the connection to it broke",
    "timed_out": "it does not answer",
    "tls": "the TLS handshake with it fails",
    "auth": "it rejects our user name and password",
    "readonly": "it refuses writes (it is a replica, or has too few replicas)",
    "loading": "it is still loading its data",
    "masterdown": "it is a replica without its primary",
    "clusterdown": "its cluster is incomplete (slots without a primary, or being moved)",
    "no_master": "no Sentinel knows a primary that is up",
    "demoted": "the Sentinels have promoted another primary",
    "oom": "its memory is full",
    "misconf": "it cannot save to its disk and refuses writes",
    "overloaded": "it is overloaded",
    "unsupported": "it lacks or forbids a command that is needed",
    "protocol": "something else than Redis answers at its address",
    "name_taken": "another running server has the same SERVER_ID",
    "closed": "this server is stopping",
}


def in_words(reason: str) -> str:
    """A loss reason in words, as the second half of a sentence about Redis."""
    return _WORDS.get(reason, reason)
