"""Which of the exceptions that end a block its user is to see."""

import trio

from bandsync.client.exceptions import ClientError, ConnectionLost, NotConnected
from bandsync.model.exception_leaves import first_leaf


def meant(group: BaseExceptionGroup[BaseException], error: ClientError | None) -> BaseException:
    """The one exception that the user of the block is to see."""
    interrupt = group.subgroup(KeyboardInterrupt)
    if interrupt is not None:
        # It may strike a task of ours, deep in groups that nobody looks into for it.
        return first_leaf(interrupt)
    others = [each for each in group.exceptions if not isinstance(each, trio.Cancelled)]
    if len(others) > 1:
        return group
    found = others[0] if others else group.exceptions[0]
    if error is not None and _is_only(found, ConnectionLost | NotConnected):
        # A command failed because the client had ended.
        return error
    return found


def _is_only(error: BaseException, kinds: type | object) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_only(each, kinds) for each in error.exceptions)
    return isinstance(error, kinds)  # type: ignore[arg-type]
