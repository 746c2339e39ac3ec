"""adapter-router: serve many PEFT LoRA adapters on shared base models."""

from __future__ import annotations

import argparse
import sys

from deployments.commands import adapters, demo, doctor, merge, quantize, serve


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the process' exit status."""
    parser = argparse.ArgumentParser(prog="adapter-router", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (demo, serve, adapters, doctor, merge, quantize):
        command.add_to(commands)
    args = parser.parse_args(argv)
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
