"""Close codes: the rule of reconnecting, and its twin in the browser client."""

import re
from pathlib import Path

import pytest

import bandsync
from bandsync.wire.close_codes import CloseCode, may_reconnect

BROWSER_TABLE = Path(bandsync.__file__).parent / "web" / "client" / "closecodes.js"
ROW = re.compile(r"^  ([A-Z_]+): \{ code: (\d+), reconnect: (true|false) \},$", re.MULTILINE)


@pytest.mark.parametrize("code", CloseCode)
def test_rule_follows_from_the_number(code: CloseCode) -> None:
    assert may_reconnect(int(code)) == code.reconnect


@pytest.mark.parametrize("code", [1000, 1001, 1006, 3000, 4999])
def test_unknown_code_lets_a_client_reconnect(code: int) -> None:
    assert may_reconnect(code)


def test_codes_are_valid_in_a_close_frame() -> None:
    assert all(1000 <= code < 1015 or 4000 <= code < 5000 for code in CloseCode)
    assert not {1005, 1006, 1015} & set(CloseCode)


def test_browser_client_has_the_same_codes() -> None:
    found = {
        name: (int(code), reconnect == "true")
        for name, code, reconnect in ROW.findall(BROWSER_TABLE.read_text())
    }
    assert found == {code.name: (code.value, code.reconnect) for code in CloseCode}
