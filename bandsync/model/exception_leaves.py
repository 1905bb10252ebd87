"""The leaves of an exception group."""

from collections.abc import Iterator
from typing import TypeVar

E = TypeVar("E", bound=BaseException)


def leaves(group: BaseExceptionGroup[E]) -> Iterator[E]:
    """The exceptions in a group that are not groups themselves, at any depth, in their order."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error


def first_leaf(group: BaseExceptionGroup[E]) -> E:
    """The first of the `leaves`."""
    return next(leaves(group))
