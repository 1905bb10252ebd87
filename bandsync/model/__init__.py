"""The state of a session: pure data, transport arithmetic, merge and clock. No I/O."""
