"""`finesight doctor`: problems of a machine, a model or a run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

from finesight.operations.operation import Outcome, Parameter, StrPath

if TYPE_CHECKING:
    from finesight.doctor.diagnosis import DiagnosisSections


EXIT_ERROR_FOUND = 2


def doctor(
    subject: Annotated[StrPath | None, Parameter(metavar="RUN|MODEL", is_positional=True)] = None,
) -> Outcome[DiagnosisSections]:
    """Diagnose a machine, a model or a run: problems, effects, and commands that fix them.

    Without an argument, this machine: memory, disks, package conflicts, torch and driver,
    environment variables, and optional packages.

    Run, from its records: why it ended, flat or rising loss, lower metrics, answers without end,
    boxes in wrong coordinates.

    Model or adapter folder: missing or corrupt files.

    The command changes nothing and does not use the network. Exit code: 0 without errors, 2 with
    errors.

    Example: finesight doctor runs/latex

    Args:
        subject: Run folder, or model or adapter folder. Default: this machine.
    """
    from finesight.doctor.all_checks import diagnose, diagnose_machine
    from finesight.doctor.diagnosis import count_severity, diagnoses_to_dict, format_diagnoses

    diagnosis = diagnose_machine(os.environ) if subject is None else diagnose(str(subject))
    exit_code = EXIT_ERROR_FOUND if count_severity(diagnosis, "error") else 0
    data = diagnoses_to_dict(diagnosis)
    lines = [*format_diagnoses(diagnosis)]
    return Outcome(diagnosis, lines, data, exit_code=exit_code)
