"""Programs for operators and developers; `scripts.testbed` is shared with the tests."""
