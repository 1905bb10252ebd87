"""The program: `bandsync`, and `python -m bandsync`."""

import sys

from bandsync.command_line import run

PROGRAM = "bandsync"


def main() -> int:
    """Run the installed script `bandsync`, and return the exit code.

    Its workers import the package with `-P`, from where this script did: a folder `bandsync` in the
    working directory cannot take its place.
    """
    return run(PROGRAM, sys.argv[1:], command=[sys.executable, "-P", "-m", PROGRAM])


if __name__ == "__main__":
    # Without `-P`: this package may have been imported from the working directory.
    sys.exit(run(PROGRAM, sys.argv[1:], command=[sys.executable, "-m", PROGRAM]))
