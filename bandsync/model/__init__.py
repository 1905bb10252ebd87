"""What a session is: pure data, transport arithmetic, merge and clock. No I/O."""
