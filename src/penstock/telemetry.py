"""What is told about the work: faults that stop it now, and log events.

`Health` is how the parts that notice a fault and the part that answers `/readyz` meet. Log
lines are a fixed message with fields, never a prompt, an answer or a key.
"""

import logging
import sys

import structlog


class Health:
    """The faults that keep this process from its work at this moment, by name."""

    def __init__(self) -> None:
        self._faults: dict[str, str] = {}

    def fail(self, name: str, message: str) -> bool:
        """Note a fault.

        Returns:
            Whether it is new, and so worth a line in the log.
        """
        is_new = name not in self._faults
        self._faults[name] = message
        return is_new

    def recover(self, name: str) -> bool:
        """Take a fault back.

        Returns:
            Whether there was one.
        """
        return self._faults.pop(name, None) is not None

    def faults(self) -> dict[str, str]:
        """The present faults: name and what a person should know."""
        return dict(self._faults)


def configure_logging(*, level: int = logging.INFO) -> None:
    """Log to standard error: for people on a terminal, as JSON elsewhere."""
    is_terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(pad_event_to=40)
            if is_terminal
            else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    # PgQueuer tells of its own comings and goings through the standard library.
    logging.getLogger("pgqueuer").setLevel(logging.ERROR)
