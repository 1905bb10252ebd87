"""The files of the pages by their names, which are their URLs."""

from pathlib import Path

_WEB = Path(__file__).parents[2] / "bandsync" / "web"

WEB_FILES = {path.name: path for path in sorted(_WEB.rglob("*")) if path.is_file()}
