"""The rules of the prose test, on samples: each must find what it is for, and nothing else."""

from pathlib import Path

import pytest

from tests.support.prose import (
    Prose,
    Repository,
    anchor_of,
    dead_citations,
    dead_commands,
    headings,
    javascript_prose,
    lua_prose,
    markdown_prose,
    python_prose,
    riddles,
)

PYTHON = '''
"""What this module does.

It is fine. Who reads it is lost.
"""

URL = "# Whose comment is in a string"  # Of all places, here.


def f(place: str) -> None:
    """Do it.

    Args:
        place: where it is done. Those who know do not ask.
    """
    # One thought, in two lines. Whatever
    # comes next is the same comment.
    # which is lower case, and in the middle of a sentence
    return None
'''


def found_in(prose: list[Prose]) -> list[tuple[int, str]]:
    return [(line, problem.split("'")[1]) for line, problem in riddles(prose)]


def test_riddles_of_python_are_found_in_docstrings_and_comments() -> None:
    assert sorted(found_in(list(python_prose(PYTHON)))) == [
        (2, "What"),
        (4, "Who"),
        (7, "Of"),
        (14, "Those"),
        (16, "Whatever"),
    ]


@pytest.mark.parametrize("word", ["Who", "Whose", "Whom", "Of", "Those", "Whoever", "Whichever"])
def test_riddle_opens_a_comment(word: str) -> None:
    assert found_in(list(python_prose(f"# {word} it is about.\n"))) == [(1, word)]
    assert found_in(list(python_prose(f"x = 1  # ({word} it is about.)\n"))) == [(1, word)]
    assert found_in(list(python_prose(f'"""`{word}` it is about."""\n'))) == [(1, word)]


@pytest.mark.parametrize(
    "text",
    [
        "The server closes those that wait, and what they sent.",
        "It is e.g. of use to those who ask.",
        "Whole frames only. Ofcom. Whatnot.",
        "The first of them: who leads.",
    ],
)
def test_subject_first_is_no_riddle(text: str) -> None:
    assert found_in(list(python_prose(f"# {text}\n"))) == []


JAVASCRIPT = """
// Whose line is it?
const url = "http://x"; // What is after a string.
const a = '// Who is in a string', b = `// Whom ${c + "// Of" /* Those in an expression */} // Who`;
const d = /[/"]\\/\\/ Who/.test(e) ? f / 2 : g; // Of a pattern.
/**
 * Fine.
 * Whichever it is.
 */
"""


def test_riddles_of_javascript_are_found_in_comments_only() -> None:
    assert sorted(found_in(list(javascript_prose(JAVASCRIPT)))) == [
        (2, "Whose"),
        (3, "What"),
        (4, "Those"),
        (5, "Of"),
        (8, "Whichever"),
    ]


LUA = """
-- Whose key it is
-- is given. Of both
local a = "-- Who" -- What is last
"""


def test_riddles_of_lua_are_found_in_comments_only() -> None:
    assert found_in(list(lua_prose(LUA))) == [(2, "Whose"), (3, "Of"), (4, "What")]


GUIDE = """# The guide

## 1. First steps

See [the end](#the-end-really), [more](docs/more.md#nothing), [none](docs/none.md) and
[outside](https://example.com/missing.md#x). Section 1 and section 4. RFC 6455, section 9.

```sh
python scripts/run.py
python scripts/old.py
python -m scripts.run
python -m scripts.old.run
# docs/none.md
```

## The `end`, (really)
"""


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    for name, text in {
        "GUIDE.md": GUIDE,
        "docs/more.md": "# More\n\n## Known limits\n\n```\n# Not a heading\n```\n",
        "scripts/__init__.py": "version = 1\n",
        "scripts/run.py": "",
        "bandsync/net/listener.py": "",
        "bandsync/net/__init__.py": "",
        ".venv/lib/hidden.py": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Repository.at(tmp_path)


def problems(text: str, repository: Repository, source: str = "scripts/run.py") -> list[str]:
    return [problem for _, problem in dead_citations([Prose(1, text)], source, repository)]


@pytest.mark.parametrize(
    "text",
    [
        "See `bandsync/net/listener.py`, `net/listener.py` or listener.py.",
        "See `docs/more.md`, section *Known limits*, and GUIDE.md section 1.",
        'Section 1 of `GUIDE.md`; `more.md`, section "Known limits".',
        "In scripts/ and `bandsync/net`; all of bandsync/net/*.py; `bandsync/{a,b}.py`.",
        "RFC 6455, section 9; ITU-T G.114, section 3; https://example.com/none.md#x",
        "`bandsync.net.listener.listen`, `scripts.version`, `python -m scripts.run`",
        "A file of the reader: `~/none.py`, `<name>.md`, `$HOME/none.toml`.",
    ],
)
def test_living_citation_passes(text: str, repository: Repository) -> None:
    assert problems(text, repository) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("See `design.md`.", "design.md does not exist"),
        ("See guide.md section 1.", "guide.md does not exist"),
        ("See `bandsync/listener.py`.", "bandsync/listener.py does not exist"),
        ("See listeners.py:", "listeners.py does not exist"),
        ("See tests/net/.", "tests/net/ does not exist"),
        ("See hidden.py.", "hidden.py does not exist"),
        ("See `bandsync.net.other.f`.", "bandsync.net.other.f does not exist"),
        ("See `bandsync.other`.", "bandsync.other does not exist"),
        ("`GUIDE.md` section 2 says so.", "GUIDE.md has no section 2"),
        ("`GUIDE.md`, sections 1 and 3.", "GUIDE.md has no section 3"),
        ("Section 7 of `GUIDE.md`.", "GUIDE.md has no section 7"),
        ("`more.md`,\nsection *Known bugs*.", "docs/more.md has no section 'Known bugs'"),
        ("`more.md`, section *Not a heading*.", "docs/more.md has no section 'Not a heading'"),
    ],
)
def test_dead_citation_is_found(text: str, problem: str, repository: Repository) -> None:
    assert problems(text, repository) == [problem]


def test_dead_links_anchors_and_own_sections_of_markdown_are_found(repository: Repository) -> None:
    found = list(dead_citations(markdown_prose(GUIDE), "GUIDE.md", repository))
    assert found == [
        (5, "link to #nothing, which docs/more.md does not have"),
        (5, "link to docs/none.md, which does not exist"),
        (6, "GUIDE.md has no section 4"),
    ]


def test_dead_commands_of_markdown_are_found(repository: Repository) -> None:
    assert list(dead_commands(GUIDE, repository)) == [
        (10, "scripts/old.py does not exist"),
        (12, "scripts.old.run does not exist"),
    ]


def test_anchor_is_that_of_github() -> None:
    assert [anchor_of(heading) for heading in headings(GUIDE)] == [
        "the-guide",
        "1-first-steps",
        "the-end-really",
    ]


def test_file_that_operators_write_counts_as_existing(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("secret.yaml\n")
    assert problems("Write secret.yaml.", Repository.at(tmp_path)) == []
