"""Rules for the prose of the repository: how sentences open, and what they cite.

Prose is what people read besides the code: comments and docstrings of Python, comments of
JavaScript and Lua, and Markdown. A finding is one line that names the place and the problem.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

# A sentence that opens with one of these makes the reader look for its subject.
RIDDLES = frozenset(
    {
        "Of",
        "Those",
        "What",
        "Whatever",
        "Which",
        "Whichever",
        "Who",
        "Whoever",
        "Whom",
        "Whomever",
        "Whose",
        "Whosever",
    }
)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')*`]*\s+(?=\S)")
_FIRST_WORD = re.compile(r"[\s\"'(*_`-]*([A-Za-z]+)")

# Suffixes of files that citations are checked for.
_SUFFIXES = "css|html|js|lua|md|png|py|svg|toml|webmanifest|ya?ml"
# Files of other projects.
_FOREIGN = frozenset({"axe.min.js"})
_URL = re.compile(r"\b[a-z][a-z+.-]*://[^\s)>`\"']+|\b(?:www\.)[\w./-]+")
_PATH = re.compile(
    rf"(?<![\w/.@$~{{}}<>*-])"
    rf"(?P<path>(?:\.{{1,2}}/)?(?:[\w-]+/)*[\w.-]*\w\.(?:{_SUFFIXES})"
    rf"|(?:bandsync|scripts|tests)/(?:[\w.-]+/)*[\w-]*)"
    rf"(?![\w*{{<$]|\.\w)"
)
_MODULE = re.compile(r"(?<![\w./-])(?:bandsync|scripts|tests)(?:\.\w+)+")
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_HEADING = re.compile(r"^(#+)\s+(.*?)\s*#*\s*$")
_FENCE = re.compile(r"^\s*(```|~~~)")
_DOCUMENT = r"(?P<document>[\w./-]*\w\.md)`?(?:\]\([^)]*\))?"
_NUMBERS = r"(?P<numbers>\d+(?:\.\d+)*(?:(?:,| and|, and) \d+(?:\.\d+)*)*)"
_TITLE = r"(?:\*(?P<star>[^*]+)\*|\"(?P<quote>[^\"]+)\")"
_SECTION_AFTER = re.compile(rf"{_DOCUMENT},? (?:in )?[Ss]ections? (?:{_NUMBERS}|{_TITLE})")
_SECTION_BEFORE = re.compile(
    rf"[Ss]ections? (?:{_NUMBERS}|{_TITLE})[^.;:]{{0,5}} (?:of|in) `?\[?`?{_DOCUMENT}"
)
_OWN_SECTION = re.compile(
    rf"(?P<before>[\w.)`\]]*,? ?(?:in )?)\b[Ss]ections? (?:{_NUMBERS}|{_TITLE})(?! (?:of|in) )"
)


@dataclass(frozen=True)
class Prose:
    """A paragraph, and the line that it begins at."""

    line: int
    text: str


@dataclass(frozen=True)
class Repository:
    """The files that citations may mean.

    Attributes:
        root: directory of the repository.
        files: paths of all files, relative to the root.
    """

    root: Path
    files: frozenset[str]

    @classmethod
    def at(cls, root: Path) -> "Repository":
        """Read the list of files, without hidden directories besides `.ci`.

        A file that a `.gitignore` beside it names counts as existing: operators write it.
        """
        files = set()
        for path in root.rglob("*"):
            parts = path.relative_to(root).parts
            hidden = (each for each in parts[:-1] if each.startswith(".") and each != ".ci")
            if not path.is_file() or "__pycache__" in parts or any(hidden):
                continue
            files.add("/".join(parts))
            if path.name == ".gitignore":
                files |= {"/".join([*parts[:-1], name]) for name in path.read_text().split()}
        return cls(root, frozenset(files))

    def find(self, cited: str, source: str) -> list[str]:
        """The files that a path may mean, cited in the file ``source``: as tail of their paths."""
        cited = cited.removeprefix("./")
        if cited.startswith("../"):
            resolved = (self.root / source).parent.joinpath(cited).resolve()
            cited = resolved.relative_to(self.root).as_posix() if self._contains(resolved) else ""
        local = f"{Path(source).parent.as_posix()}/{cited}".removeprefix("./")
        for exact in (local, cited):
            if exact in self.files:
                return [exact]
        return [path for path in self.files if path.endswith(f"/{cited}")]

    def has_directory(self, cited: str) -> bool:
        """Whether a path names a directory, from the root."""
        return (self.root / cited).is_dir()

    def has_module(self, dotted: str) -> bool:
        """Whether a dotted name leads to a module or package, and any attribute of one."""
        parts = dotted.split(".")
        package = "/".join(parts[:2])
        if f"{package}.py" in self.files:
            return True
        if not self.has_directory(package):
            # An attribute of the package itself: `bandsync.__version__`.
            init = self.root / parts[0] / "__init__.py"
            return init.is_file() and re.search(rf"\b{parts[1]}\b", init.read_text()) is not None
        if len(parts) == 2:
            return True
        third = f"{package}/{parts[2]}"
        if f"{third}.py" in self.files or self.has_directory(third):
            return True
        init = self.root / package / "__init__.py"
        return init.is_file() and re.search(rf"\b{parts[2]}\b", init.read_text()) is not None

    def _contains(self, path: Path) -> bool:
        return path == self.root or self.root in path.parents


def python_prose(source: str) -> Iterator[Prose]:
    """The docstrings and comments of a Python file; adjoining comment lines are one text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and (docstring := ast.get_docstring(node)):
            yield from _paragraphs(node.body[0].lineno, docstring)
    comments: list[tuple[int, int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("#!"):
            alone = not token.line[: token.start[1]].strip()
            column = token.start[1] if alone else -token.start[0]
            comments.append((token.start[0], column, token.string.lstrip("#").strip()))
    yield from _joined(comments)


def javascript_prose(source: str) -> Iterator[Prose]:
    """The comments of a JavaScript file; adjoining ``//`` lines are one text."""
    comments: list[tuple[int, int, str]] = []
    position, line = 0, 1
    # The last character of code: a slash after a value divides, others begin an expression.
    last = ""
    # One entry per open `${`: the number of braces open inside of it.
    templates: list[int] = []
    while position < len(source):
        character = source[position]
        start = position
        if source.startswith("//", position):
            position = _find(source, "\n", position)
            before = source[source.rfind("\n", 0, start) + 1 : start]
            column = len(before) if not before.strip() else -line
            comments.append((line, column, source[start:position].lstrip("/").strip()))
        elif source.startswith("/*", position):
            position = _find(source, "*/", position) + 2
            lines = source[start + 2 : position - 2].splitlines()
            text = "\n".join(each.strip().removeprefix("*").strip() for each in lines)
            yield from _joined(comments)
            comments = []
            yield from _paragraphs(line, text)
        elif character in "\"'":
            position = _end_of_string(source, position)
            last = '"'
        elif character == "`" or (character == "}" and templates and templates[-1] == 0):
            if character == "}":
                templates.pop()
            position, interpolates = _end_of_template(source, position + 1)
            if interpolates:
                templates.append(0)
            last = "{" if interpolates else '"'
        elif character == "/" and (not last or last in "(,=:[!&|?{};+-*%<>~^\n"):
            position = _end_of_regex(source, position)
            last = '"'
        else:
            if templates and character in "{}":
                templates[-1] += 1 if character == "{" else -1
            if not character.isspace():
                last = character
            position += 1
        line += source.count("\n", start, position)
    yield from _joined(comments)


def lua_prose(source: str) -> Iterator[Prose]:
    """The ``--`` comments of a Lua file; adjoining lines are one text."""
    comments: list[tuple[int, int, str]] = []
    for number, line in enumerate(source.splitlines(), 1):
        code = re.sub(r"\"[^\"]*\"|'[^']*'", lambda match: "_" * len(match[0]), line)
        column = code.find("--")
        if column >= 0:
            place = column if not code[:column].strip() else -number
            comments.append((number, place, line[column:].lstrip("-").strip()))
    yield from _joined(comments)


def markdown_prose(source: str) -> Iterator[Prose]:
    """The paragraphs of a Markdown file, without fenced code."""
    fenced = False
    paragraph: list[str] = []
    for number, line in enumerate([*source.splitlines(), ""], 1):
        if _FENCE.match(line):
            fenced = not fenced
        starts = re.match(r"\s*(?:[-*+]|\d+\.|\||#)\s?", line)
        if (fenced or not line.strip() or starts or _FENCE.match(line)) and paragraph:
            yield Prose(number - len(paragraph), "\n".join(paragraph))
            paragraph = []
        if not fenced and line.strip() and not _FENCE.match(line):
            paragraph.append(line)


def riddles(prose: Iterable[Prose]) -> Iterator[tuple[int, str]]:
    """Sentences that open with a relative or interrogative clause instead of their subject."""
    for text in prose:
        offset = 0
        starts = [0, *(match.end() for match in _SENTENCE_END.finditer(text.text)), len(text.text)]
        for start, end in pairwise(starts):
            offset = text.text.count("\n", 0, start)
            sentence = text.text[start:end]
            first = _FIRST_WORD.match(sentence)
            if first is not None and first[1] in RIDDLES:
                opening = " ".join(sentence.split()[:6])
                yield text.line + offset, f"a sentence opens with {first[1]!r}: {opening} …"


def dead_citations(
    prose: Iterable[Prose], source: str, repository: Repository
) -> Iterator[tuple[int, str]]:
    """Files, modules, sections and anchors that a file cites and that do not exist.

    Args:
        prose: texts of the file.
        source: path of the file, from the root of the repository.
    """
    for paragraph in prose:
        # Line numbers stay right: a URL has no line break.
        text = _URL.sub("", paragraph.text)
        for position, problem in (
            *_dead_links(text, source, repository),
            *_dead_paths(_LINK.sub(_blank, text), source, repository),
            *_dead_sections(text, source, repository),
        ):
            yield paragraph.line + text.count("\n", 0, position), problem


def dead_commands(source: str, repository: Repository) -> Iterator[tuple[int, str]]:
    """Paths and modules of this repository in the fenced code of a Markdown file."""
    fenced = False
    for number, line in enumerate(source.splitlines(), 1):
        if _FENCE.match(line):
            fenced = not fenced
        elif fenced:
            for match in re.finditer(r"(?<![\w/.-])(?:bandsync|scripts|tests)/[\w./-]*\w", line):
                if match[0] not in repository.files and not repository.has_directory(match[0]):
                    yield number, f"{match[0]} does not exist"
            for match in re.finditer(r"-m ((?:bandsync|scripts|tests)(?:\.\w+)+)", line):
                if not repository.has_module(match[1]):
                    yield number, f"{match[1]} does not exist"


def headings(document: str) -> list[str]:
    """The headings of a Markdown file, without their signs."""
    found, fenced = [], False
    for line in document.splitlines():
        if _FENCE.match(line):
            fenced = not fenced
        elif not fenced and (match := _HEADING.match(line)):
            found.append(match[2])
    return found


def anchor_of(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def _dead_links(text: str, source: str, repository: Repository) -> Iterator[tuple[int, str]]:
    for match in _LINK.finditer(text):
        target, _, anchor = match["target"].partition("#")
        if ":" in target:
            continue
        path = _linked(target, source, repository)
        if path is None:
            yield match.start(), f"link to {target}, which does not exist"
        elif anchor and path.endswith(".md"):
            document = (repository.root / path).read_text()
            if anchor not in {anchor_of(heading) for heading in headings(document)}:
                yield match.start(), f"link to #{anchor}, which {path} does not have"


def _linked(target: str, source: str, repository: Repository) -> str | None:
    """The path of a link target, from the root; None if it does not exist."""
    if not target:
        return source
    absolute = (repository.root / source).parent.joinpath(target).resolve()
    if not absolute.exists() or not absolute.is_relative_to(repository.root):
        return None
    return absolute.relative_to(repository.root).as_posix()


def _dead_paths(text: str, source: str, repository: Repository) -> Iterator[tuple[int, str]]:
    for match in _PATH.finditer(text):
        cited = match["path"].rstrip(".")
        known = cited in _FOREIGN or repository.has_directory(cited)
        if not known and not repository.find(cited, source):
            yield match.start(), f"{cited} does not exist"
    for match in _MODULE.finditer(text):
        if match.end() < len(text) and text[match.end()] in "/-":
            continue
        if not repository.find(match[0], source) and not repository.has_module(match[0]):
            yield match.start(), f"{match[0]} does not exist"


def _dead_sections(text: str, source: str, repository: Repository) -> Iterator[tuple[int, str]]:
    flat = re.sub(r"\s", " ", text)
    seen: list[tuple[int, int]] = []
    for pattern in (_SECTION_AFTER, _SECTION_BEFORE):
        for match in pattern.finditer(flat):
            seen.append(match.span())
            # A document that does not exist is reported as a path.
            for path in repository.find(match["document"], source)[:1]:
                yield from _missing(match, path, repository)
    if not source.endswith(".md"):
        return
    for match in _OWN_SECTION.finditer(flat):
        foreign = re.search(r"(?:RFC|ITU)[^;.]{0,20}$", flat[: match.start()] + match["before"])
        inside = any(start <= match.end() and match.start() <= end for start, end in seen)
        if not foreign and not inside:
            yield from _missing(match, source, repository)


def _missing(match: re.Match[str], path: str, repository: Repository) -> Iterator[tuple[int, str]]:
    existing = headings((repository.root / path).read_text())
    for number in re.findall(r"\d+(?:\.\d+)*", match["numbers"] or ""):
        if not any(re.match(rf"{re.escape(number)}(?:\.? |\.?$)", each) for each in existing):
            yield match.start(), f"{path} has no section {number}"
    title = match["star"] or match["quote"]
    if title and anchor_of(title) not in {
        anchor_of(re.sub(r"^[\d.]+ ", "", heading)) for heading in existing
    } | {anchor_of(heading) for heading in existing}:
        yield match.start(), f"{path} has no section {title!r}"


def _joined(comments: Iterable[tuple[int, int, str]]) -> Iterator[Prose]:
    """Comments on adjoining lines, in one column, as one text."""
    first, lines, previous = 0, list[str](), (0, 0)
    for line, column, text in comments:
        if lines and (line, column) == (previous[0] + 1, previous[1]):
            lines.append(text)
        else:
            if lines:
                yield Prose(first, "\n".join(lines))
            first, lines = line, [text]
        previous = (line, column)
    if lines:
        yield Prose(first, "\n".join(lines))


def _paragraphs(line: int, text: str) -> Iterator[Prose]:
    """The paragraphs of a docstring; each entry of a list of arguments is one of its own."""
    paragraph: list[str] = []
    for number, each in enumerate([*text.splitlines(), ""], line):
        entry = re.match(r"\s+\*{0,2}[\w.`, ]+(?: \([^)]*\))?: ", each)
        if paragraph and (not each.strip() or entry):
            yield Prose(number - len(paragraph), "\n".join(paragraph))
            paragraph = []
        if each.strip():
            paragraph.append(each)


def _find(source: str, end: str, position: int) -> int:
    found = source.find(end, position)
    return len(source) if found < 0 else found


def _end_of_string(source: str, position: int) -> int:
    quote = source[position]
    position += 1
    while position < len(source) and source[position] not in {quote, "\n"}:
        position += 2 if source[position] == "\\" else 1
    return position + 1


def _end_of_template(source: str, position: int) -> tuple[int, bool]:
    """The position after a template's end or its next ``${``, and whether it is the latter."""
    while position < len(source) and source[position] != "`":
        if source.startswith("${", position):
            return position + 2, True
        position += 2 if source[position] == "\\" else 1
    return position + 1, False


def _end_of_regex(source: str, position: int) -> int:
    position += 1
    in_class = False
    while position < len(source) and source[position] != "\n":
        character = source[position]
        if character == "/" and not in_class:
            return position + 1
        in_class = character == "[" or (in_class and character != "]")
        position += 2 if character == "\\" else 1
    return position


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])
