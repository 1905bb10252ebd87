"""Why Redis cannot be used, in the words of somebody at the side of a stage."""

_WORDS = {
    "refused": "nothing answers at its address",
    "unreachable": "the network does not reach it",
    "reset": "the connection to it broke",
    "timed_out": "it does not answer",
    "tls": "a secure connection (TLS) to it cannot be made",
    "auth": "it does not accept our name and password",
    "readonly": "it takes no writes (it is a replica, or lacks replicas)",
    "loading": "it is still loading its data",
    "masterdown": "it has lost its primary",
    "clusterdown": "its cluster is not whole (slots without a primary, or on their way)",
    "no_master": "no Sentinel names a primary that is alive",
    "demoted": "the Sentinels have made another one the primary",
    "oom": "its memory is full",
    "misconf": "it cannot save to its disk and takes no writes",
    "overloaded": "it is overloaded",
    "unsupported": "it lacks, or forbids, a command that is needed",
    "protocol": "what answers at its address is not a Redis",
    "name_taken": "another live server has the same SERVER_ID",
    "closed": "the server stops",
}


def in_words(reason: str) -> str:
    """What a loss reason means, as the second half of a sentence about Redis."""
    return _WORDS.get(reason, reason)
