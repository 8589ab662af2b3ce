"""torchrun, without a traceback for a run that was stopped: `python -m finesight.launch.torchrun`.

torchrun reports a signal, and each exit code of its processes besides 0, as a failure. This module
takes the same options and environment variables. It ends with exit code 75 if the processes have
written a checkpoint, as a training does without torchrun.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from finesight.errors import EXIT_CHECKPOINTED, EXIT_CODES_VARIABLE

EXIT_FAILED = 1

EXIT_INTERRUPTED = 130


def launch(arguments: Sequence[str]) -> int:
    """Start processes with the options of torchrun, and return the exit code."""
    with TemporaryDirectory() as folder:
        os.environ.update({EXIT_CODES_VARIABLE: folder})
        try:
            run(parse_args(list(arguments)))  # type: ignore[no-untyped-call]
        except ChildFailedError as error:
            # torchrun ends the other processes by SIGTERM, also while they exit.
            codes = {failure.exitcode for failure in error.failures.values()}
            if codes == {EXIT_CHECKPOINTED} or codes == {EXIT_CHECKPOINTED, -signal.SIGTERM}:
                return EXIT_CHECKPOINTED
            print(error, file=sys.stderr)
            return EXIT_FAILED
        except SignalException as stop:
            print(f"torchrun was stopped by {signal.Signals(stop.sigval).name}", file=sys.stderr)
            written = {path.read_text() for path in Path(folder).iterdir()}
            return EXIT_CHECKPOINTED if written == {str(EXIT_CHECKPOINTED)} else EXIT_FAILED
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
