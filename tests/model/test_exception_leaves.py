"""The leaves of exception groups."""

import pytest

from bandsync.model.exception_leaves import first_leaf, leaves

ONE, TWO, THREE = ValueError(1), ValueError(2), ValueError(3)
NESTED = ExceptionGroup("outer", [ExceptionGroup("inner", [ONE, TWO]), THREE])


@pytest.mark.parametrize(
    ("group", "found"), [(ExceptionGroup("flat", [TWO]), [TWO]), (NESTED, [ONE, TWO, THREE])]
)
def test_leaves_come_in_order_at_any_depth(
    group: ExceptionGroup[ValueError], found: list[ValueError]
) -> None:
    assert list(leaves(group)) == found
    assert first_leaf(group) is found[0]
