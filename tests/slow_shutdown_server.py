"""Server process whose limits permit images that take minutes.

Usage: `python slow_shutdown_server.py SECONDS`. SECONDS is the shutdown timeout; prints its port.
"""

import sys

from finesight.infer.model_loader import load_inference_model
from finesight.serve.api_schema import ServerLimits
from finesight.serve.api_server import run_api_server
from finesight.serve.http_protocol import bind_socket


def main() -> None:
    """Serve until told to stop."""
    limits = ServerLimits(
        shutdown_timeout_s=float(sys.argv[1]),
        max_image_cpu_s=900.0,
        max_request_cpu_s=900.0,
        max_num_seqs=4,
    )
    inference_model = load_inference_model("finesight-tiny", "cpu", "fp32")
    location = bind_socket("127.0.0.1", 0)
    port = location.getsockname()[1]
    run_api_server(
        inference_model,
        location,
        api_keys=[],
        limits=limits,
        on_ready=lambda *_: print(port, flush=True),
    )


if __name__ == "__main__":
    main()
