"""Comments and docstrings open with their subject; every file and section that is cited exists."""

from collections import defaultdict
from pathlib import Path

import pytest

from tests.support.prose import (
    Prose,
    Repository,
    dead_citations,
    dead_commands,
    javascript_prose,
    lua_prose,
    markdown_prose,
    python_prose,
    riddles,
)

ROOT = Path(__file__).parent.parent
REPOSITORY = Repository.at(ROOT)
READERS = {".py": python_prose, ".js": javascript_prose, ".lua": lua_prose, ".md": markdown_prose}
# Its samples are prose that the rules must reject.
SAMPLES = {"tests/test_prose_rules.py"}


def folder_of(path: str) -> str:
    """The package of a file: each has a test of its own."""
    return "/".join(path.split("/")[:-1][:2]) or "."


FOLDERS: dict[str, list[str]] = defaultdict(list)
for each in sorted(REPOSITORY.files - SAMPLES):
    if Path(each).suffix in READERS:
        FOLDERS[folder_of(each)].append(each)


def prose_of(path: str) -> list[Prose]:
    return list(READERS[Path(path).suffix]((ROOT / path).read_text()))


def fail_if(found: list[str]) -> None:
    if found:
        pytest.fail("\n".join(found), pytrace=False)


@pytest.mark.parametrize("folder", FOLDERS)
def test_sentences_open_with_their_subject(folder: str) -> None:
    fail_if(
        [
            f"{path}:{line}: {problem}"
            for path in FOLDERS[folder]
            if not path.endswith(".md")
            for line, problem in riddles(prose_of(path))
        ]
    )


@pytest.mark.parametrize("folder", FOLDERS)
def test_cited_files_and_sections_exist(folder: str) -> None:
    found = []
    for path in FOLDERS[folder]:
        dead = [*dead_citations(prose_of(path), path, REPOSITORY)]
        if path.endswith(".md"):
            dead += dead_commands((ROOT / path).read_text(), REPOSITORY)
        found += [f"{path}:{line}: {problem}" for line, problem in sorted(dead)]
    fail_if(found)
