#!/usr/bin/env python3
"""Start BandSync from a checkout; the same as the installed program `bandsync`."""

import sys

from bandsync.command_line import run

if __name__ == "__main__":
    sys.exit(run("serve.py", sys.argv[1:], command=[sys.executable, __file__]))
