"""The exceptions a user of this project can meet, drawn as one tree.

    PlannerError                   exit code 1 unless said otherwise
    |-- InfeasibleError        1   the model cannot be placed on this machine
    |-- ConstraintError        2   pins, limits or options that contradict each other or the model
    |   `-- ForbiddenLinkError     what fits would send over links that are not allowed
    |-- SourceError            3   a model, checkpoint or file that cannot be read or is hostile
    |   `-- UnsupportedModelError  a model that can be read, but is of no known architecture
    |       `-- NoClassError       one whose code is neither here nor in transformers
    |-- MachineError           3   a machine description or probe that gives no devices
    `-- PlanMismatchError      3   a plan that belongs to another checkpoint, machine or model

Every message says what is wrong (with values and units), where, the rule, and what to do.
"""

from __future__ import annotations


class PlannerError(Exception):
    """Root of everything this project raises on purpose; `exit_code` is the process's.

    `is_reported` says that the message has been printed, by one process for several that end with it.
    """

    exit_code = 1
    is_reported = False


class InfeasibleError(PlannerError):
    """No legal placement exists.

    `shortfall_bytes` maps a device's name to the bytes it lacks in the nearest placement;
    `advice` lists changes that were tried and would fit.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, shortfall_bytes: dict[str, int] | None = None, advice: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.shortfall_bytes = dict(shortfall_bytes or {})
        self.advice = advice


class ConstraintError(PlannerError):
    """Constraints that no placement can satisfy, whatever the memory."""

    exit_code = 2


class ForbiddenLinkError(ConstraintError):
    """Placements that fit, all of which send over links that are not allowed."""


class SourceError(PlannerError):
    """A model, checkpoint or file that is missing, damaged, hostile or not what it claims."""

    exit_code = 3


class UnsupportedModelError(SourceError):
    """A readable model of an architecture that is not known here."""


class NoClassError(UnsupportedModelError):
    """A model whose code is neither here nor in the installed transformers."""


class MachineError(PlannerError):
    """A machine that cannot be read, parsed or probed."""

    exit_code = 3


class PlanMismatchError(PlannerError):
    """A plan for another checkpoint, machine or model than the one at hand."""

    exit_code = 3
