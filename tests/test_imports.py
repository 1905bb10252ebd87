"""Imports follow the arrows of the design: down, never up."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bandsync"

# From the top down; a module may import those of its own row and of the rows below.
ROWS = [
    {"workers"},
    {"worker"},
    {"app"},
    {"state"},
    {"net", "ops"},
    {"sweeper", "hub", "rooms", "seats", "mirror", "rota"},
    {"storage"},
    {"redis_link"},
]
# Pure: no I/O, no Trio, no clock but the argument.
PURE = {
    "clock",
    "commands",
    "counters",
    "decide",
    "draft",
    "frames",
    "http",
    "joining",
    "limits",
    "merge",
    "messages",
    "reconcile",
    "rendezvous",
    "session",
    "settings",
    "tokens",
    "transport",
    "views",
}
# Stands aside: nothing of the server imports it, and of the server it knows only the pure layer.
CLIENT = "client"
CLIENT_LIBRARIES = {"trio", "trio_websocket", "wsproto", "h11", "msgspec"}
PURE_IN_CLIENT = {"backoff", "errors", "estimate", "inbound", "view"}
IMPURE_LIBRARIES = {
    "trio",
    "anyio",
    "trio_websocket",
    "h11",
    "redis",
    "structlog",
    "prometheus_client",
    "dotenv",
    "socket",
    "ssl",
    "os",
    "time",
    "random",
    "secrets",
    "asyncio",
    "threading",
    "datetime",
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            # ``from bandsync import x`` may name a module or an attribute.
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path: Path) -> None:
    part = part_of(path)
    if part == CLIENT:
        return
    row = next((index for index, names in enumerate(ROWS) if part in names), None)
    if row is None:
        assert part in PURE, f"{part} stands in no row: decide where it belongs"
    known = set().union(*ROWS, PURE)
    for name in imports(path):
        if not name.startswith("bandsync."):
            if part in PURE:
                assert name.split(".")[0] not in IMPURE_LIBRARIES, f"{part} imports {name}"
            continue
        target = name.split(".")[1]
        if target not in known:
            assert target == "__version__", f"{part} imports {name}"
            continue
        allowed = set(PURE) if row is None else set(PURE).union(*ROWS[row:])
        if part in {"net", "ops"}:
            allowed -= {"net", "ops"} - {part}
        assert target in allowed, f"{part} imports {name}"


CLIENT_MODULES = [path for path in MODULES if part_of(path) == CLIENT]


@pytest.mark.parametrize("path", CLIENT_MODULES, ids=lambda path: path.name)
def test_the_client_knows_only_the_pure_layer(path: Path) -> None:
    pure = path.stem in PURE_IN_CLIENT
    for name in imports(path):
        library, *inner = name.split(".")
        if library != "bandsync":
            assert library in CLIENT_LIBRARIES | sys.stdlib_module_names, f"imports {name}"
            assert not (pure and library in IMPURE_LIBRARIES), f"imports {name}"
        elif inner[:1] == [CLIENT]:
            assert not pure or inner[1] in PURE_IN_CLIENT, f"imports {name}"
        elif inner:
            assert inner[0] in PURE, f"imports {name}"


def is_pure(path: Path) -> bool:
    return part_of(path) in PURE or (part_of(path) == CLIENT and path.stem in PURE_IN_CLIENT)


def test_the_pure_layer_reads_no_clock() -> None:
    for path in MODULES:
        if is_pure(path):
            text = path.read_text()
            assert ".now()" not in text.replace("self.now()", "")
            assert "current_time" not in text
