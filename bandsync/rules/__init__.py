"""The rules of a session. Pure: no I/O, no Trio; `now` is an argument."""
