"""``adapter-router serve``."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from adapter_router.catalog.location import resolve

_DEFAULT_CONFIG = "package:deployments/configs/cpu.yaml"


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("serve", help="serve a config on this machine until interrupted")
    parser.add_argument("config", nargs="?", default=_DEFAULT_CONFIG, help="a Serve config file (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="adapters load from any readable path: keep it on loopback")
    parser.add_argument("--port", type=int, default=8000)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0: it was told to stop; 2: the config cannot be read."""
    from deployments.local import deploy_all, local_ray, read_config  # noqa: PLC0415 - Ray and torch take seconds

    try:
        apps = read_config(Path(resolve(args.config)))
    except (OSError, ValueError) as error:
        print(f"{args.config}: {error}", file=sys.stderr)
        return 2
    for app in apps:
        scale = app.args.autoscaling
        replicas = app.args.replicas if scale is None else f"{scale.min_replicas} to {scale.max_replicas}"
        print(f"starting {replicas} replicas of {app.args.base} at {app.route_prefix}", flush=True)
    with local_ray(args.port, args.host, log_to_stderr=True):
        deploy_all(apps)
        print(
            f"serving on http://{args.host}:{args.port} - try GET /v1/models, POST /v1/classify, GET /metrics; ", end=""
        )
        print("Ctrl-C stops", flush=True)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        stop.wait()
        print("stopping", flush=True)
    return 0
