"""BandSync keeps a band on the same page: one session, one leader, one beat."""

__version__ = "0.1.0"
