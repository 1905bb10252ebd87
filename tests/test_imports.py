"""Imports point down: the order of the packages, no circle, and one name for one thing."""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bandsync"

# From the top down. A package imports those of the rows below, and nothing of its own row.
ROWS = [
    ("__main__",),
    ("command_line",),
    ("workers",),
    ("app",),
    ("startup", "server_state"),
    ("net", "ops"),
    ("handoff", "rooms"),
    ("storage",),
    ("redis_link",),
    ("counters", "settings"),
    ("rules",),
    ("wire",),
    ("model",),
]
# No I/O, no Trio, no clock but the argument ``now``.
PURE = {"model", "wire", "rules", "settings", "counters"}
# The client SDK stands beside the server. The server does not import it.
CLIENT = "client"
CLIENT_MAY_IMPORT = {"client", "model", "wire"}
CLIENT_LIBRARIES = {"trio", "trio_websocket", "wsproto", "h11", "msgspec"}
PURE_IN_CLIENT = {"retry_delay", "exceptions", "estimate", "inbound", "view"}
IMPURE_LIBRARIES = {
    "anyio",
    "asyncio",
    "datetime",
    "dotenv",
    "h11",
    "os",
    "prometheus_client",
    "random",
    "redis",
    "secrets",
    "socket",
    "ssl",
    "structlog",
    "threading",
    "time",
    "trio",
    "trio_websocket",
}
# `cluster` has its own kind of link and of subscriber, under the same name as the plain one.
SAME_MODULE_NAMES = {"__init__", "__main__", "connection", "link", "subscriber"}

MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """The dotted name, as ``import`` wants it."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path): path for path in MODULES}


def package_of(name: str) -> str:
    """The package directly below `bandsync`, or the module if it is in no package."""
    return name.split(".")[1] if "." in name else ""


def imports(path: Path) -> Iterator[str]:
    """The names of all imported modules, those of the standard library included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:
                # ``from bandsync.model import merge`` names a module, most names an attribute.
                full = f"{node.module}.{alias.name}"
                yield full if full in NAMES else node.module


def imported_packages(path: Path) -> set[str]:
    return {
        package_of(name) for name in imports(path) if name.startswith("bandsync.") and "." in name
    }


@pytest.mark.parametrize("name", NAMES)
def test_package_imports_only_rows_below(name: str) -> None:
    package = package_of(name)
    if package in {"", CLIENT}:
        return
    row = next((number for number, names in enumerate(ROWS) if package in names), None)
    assert row is not None, f"{package} is in no row: decide where it belongs"
    allowed = {package}.union(*ROWS[row + 1 :])
    assert imported_packages(NAMES[name]) <= allowed


@pytest.mark.parametrize("name", [name for name in NAMES if package_of(name) in PURE])
def test_pure_package_uses_no_impure_library(name: str) -> None:
    libraries = {imported.split(".")[0] for imported in imports(NAMES[name])}
    assert not libraries & IMPURE_LIBRARIES


@pytest.mark.parametrize("name", [name for name in NAMES if package_of(name) == CLIENT])
def test_client_imports_only_the_wire_contract(name: str) -> None:
    path = NAMES[name]
    pure = path.stem in PURE_IN_CLIENT
    assert imported_packages(path) <= CLIENT_MAY_IMPORT
    for imported in imports(path):
        library = imported.split(".")[0]
        if library != "bandsync":
            assert library in CLIENT_LIBRARIES | sys.stdlib_module_names
            assert not (pure and library in IMPURE_LIBRARIES)
        elif pure and package_of(imported) == CLIENT:
            assert imported.split(".")[2] in PURE_IN_CLIENT


def is_pure(name: str) -> bool:
    path = NAMES[name]
    return package_of(name) in PURE or (package_of(name) == CLIENT and path.stem in PURE_IN_CLIENT)


@pytest.mark.parametrize("name", [name for name in NAMES if is_pure(name)])
def test_pure_module_reads_no_clock(name: str) -> None:
    text = NAMES[name].read_text()
    assert ".now()" not in text.replace("self.now()", "")
    assert "current_time" not in text


def repeated(places: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The names that stand in several places, with the places."""
    found = defaultdict(list)
    for name, place in places:
        found[name].append(place)
    return {name: places for name, places in found.items() if len(places) > 1}


def test_module_names_are_unique() -> None:
    stems = ((path.stem, name) for name, path in NAMES.items() if path.stem != "__init__")
    packages = ((path.parent.name, name) for name, path in NAMES.items() if path.stem == "__init__")
    same = repeated([*stems, *packages])
    assert same.keys() <= SAME_MODULE_NAMES, same


def test_class_names_are_unique() -> None:
    same = repeated(
        (node.name, name)
        for name, path in NAMES.items()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    )
    assert not same


def test_imports_have_no_circle() -> None:
    """Also none through a `TYPE_CHECKING` block or an import inside a function."""
    graph = {
        name: {each for each in imports(path) if each in NAMES and each != name}
        for name, path in NAMES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])), pytrace=False)


def python_files() -> list[Path]:
    """All Python files of the repository."""
    folders = ("bandsync", "scripts", "tests")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def names_sys_path(tree: ast.AST) -> bool:
    return any(
        (isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path")
        or (isinstance(node, ast.ImportFrom) and node.module == "sys" and "path" in names_of(node))
        for node in ast.walk(tree)
    )


def names_of(node: ast.ImportFrom) -> set[str]:
    return {alias.name for alias in node.names}


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import sys\nsys.path.insert(0, '.')", True),
        ("from sys import path", True),
        ("'sys.path'  # sys.path", False),
        ("from os import path\nrequest.path", False),
    ],
)
def test_use_of_the_import_path_is_recognised(code: str, found: bool) -> None:
    assert names_sys_path(ast.parse(code)) == found


def test_import_path_is_not_edited() -> None:
    this = Path(__file__)
    edited = [
        str(path.relative_to(ROOT))
        for path in python_files()
        if path != this and names_sys_path(ast.parse(path.read_text()))
    ]
    assert not edited


def foreign_private(tree: ast.Module) -> set[str]:
    """Private attributes that are read or set, and that nothing in this module defines."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, DEFINITIONS)}
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = node.value
            if isinstance(owner, ast.Name) and owner.id in {"self", "cls"}:
                own.add(node.attr)
            else:
                used.add(node.attr)
    return used - own


DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


# Public in spite of their names: methods of named tuples.
PUBLIC = {"_asdict", "_fields", "_make", "_replace"}


def is_private(name: str) -> bool:
    """Whether a name is private; ``__names__`` and ``_names_`` (of enums) are not."""
    return name.startswith("_") and not name.endswith("_") and name not in PUBLIC


def test_foreign_private_attribute_is_recognised() -> None:
    code = """
class Own:
    def __init__(self, other):
        self._mine = other.__class__
        other._mine = self._theirs
        other._foreign()
"""
    assert foreign_private(ast.parse(code)) == {"_foreign"}


def test_private_attributes_stay_in_their_module() -> None:
    found = {
        str(path.relative_to(ROOT)): foreign
        for path in [*MODULES, *(ROOT / "scripts").rglob("*.py")]
        if (foreign := foreign_private(ast.parse(path.read_text())))
    }
    assert not found


def test_no_private_access_is_excused() -> None:
    code = "SLF" + "001"
    excused = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in [*MODULES, *(ROOT / "scripts").rglob("*.py")]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "noqa" in line and code in line
    ]
    assert not excused
