"""Close codes: after which of them a client reconnects."""

import pytest

from bandsync.wire.close_codes import CloseCode, may_reconnect


@pytest.mark.parametrize("code", CloseCode)
def test_rule_follows_from_the_number(code: CloseCode) -> None:
    assert may_reconnect(int(code)) == code.reconnect


@pytest.mark.parametrize("code", [1000, 1001, 1006, 3000, 4999])
def test_unknown_code_lets_a_client_reconnect(code: int) -> None:
    assert may_reconnect(code)


def test_codes_are_valid_in_a_close_frame() -> None:
    assert all(1000 <= code < 1015 or 4000 <= code < 5000 for code in CloseCode)
    assert not {1005, 1006, 1015} & set(CloseCode)
