"""Picks the exception that the user of a `connect` block sees."""

import trio

from bandsync.client.exceptions import ClientError, ConnectionLost, NotConnected
from bandsync.model.exception_leaves import first_leaf


def meant(group: BaseExceptionGroup[BaseException], error: ClientError | None) -> BaseException:
    """The single exception to raise from the block.

    Args:
        group: everything that the block's nursery raised.
        error: why the client ended; None if it did not.
    """
    interrupt = group.subgroup(KeyboardInterrupt)
    if interrupt is not None:
        # Ctrl-C may be raised in a task of the client, nested in exception groups.
        return first_leaf(interrupt)
    others = [each for each in group.exceptions if not isinstance(each, trio.Cancelled)]
    if len(others) > 1:
        return group
    found = others[0] if others else group.exceptions[0]
    if error is not None and _is_only(found, ConnectionLost | NotConnected):
        # The command failed because the client had ended: the reason is more useful.
        return error
    return found


def _is_only(error: BaseException, kinds: type | object) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_only(each, kinds) for each in error.exceptions)
    return isinstance(error, kinds)  # type: ignore[arg-type]
