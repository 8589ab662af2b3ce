"""`python patient_server.py SECONDS`: a server that lets images take minutes, in its own process.

It has SECONDS to finish running answers, and prints its port once it listens.
"""

from __future__ import annotations

import sys

from finesight.infer.load import load_answerer
from finesight.serve.limits import Limits
from finesight.serve.run import listen, serve


def main() -> None:
    """Serve until told to stop."""
    limits = Limits(
        closing_seconds=float(sys.argv[1]), image_seconds=900.0, prepare_seconds=900.0, rows=4
    )
    answerer = load_answerer("finesight-tiny", "cpu", "fp32")
    place = listen("127.0.0.1", 0, [])
    port = place.getsockname()[1]
    serve(answerer, place, keys=[], limits=limits, ready=lambda _: print(port, flush=True))


if __name__ == "__main__":
    main()
