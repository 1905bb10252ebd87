"""Structured logs on standard error: events with names, for people or for machines."""

import sys
from typing import TextIO

import structlog
from structlog.typing import FilteringBoundLogger, Processor

from bandsync.settings import Settings


def make_logger(settings: Settings, out: TextIO = sys.stderr) -> FilteringBoundLogger:
    """A logger that writes to ``out`` what the settings ask for."""
    processors: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if settings.log_format == "json":
        processors += [
            structlog.processors.dict_tracebacks,
            structlog.processors.JSONRenderer(),
        ]
    else:
        processors.append(structlog.dev.ConsoleRenderer(colors=out.isatty()))
    logger: FilteringBoundLogger = structlog.wrap_logger(
        structlog.PrintLogger(out),
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
    )
    return logger
