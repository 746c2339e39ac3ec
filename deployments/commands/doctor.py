"""``adapter-router doctor``."""

from __future__ import annotations

import argparse
import json
import sys


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("doctor", help="say whether an adapter can be served, and how to mend it")
    parser.add_argument("directory", help="a PEFT adapter directory, or package:module/subdir")
    parser.add_argument("--base", required=True, help="the base model: a directory, or package:module/subdir")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.add_argument("--canary", action="store_true", help="also compare rows alone with rows beside a neighbour")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0: it can be served; 1: it is refused; 2: the base cannot be had."""
    import transformers  # noqa: PLC0415 - only commands on weights need torch in this process

    from adapter_router.doctor import diagnose  # noqa: PLC0415

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        diagnosis = diagnose(args.directory, args.base, canary=args.canary)
    except (OSError, ValueError) as error:
        print(f"base {args.base}: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(diagnosis.document(), indent=2))
    else:
        verdict, *rest = diagnosis.lines()
        colour = "\033[31m" if diagnosis.problems else "\033[32m"
        print(f"{colour}{verdict}\033[0m" if sys.stdout.isatty() else verdict)
        print("\n".join(rest))
    return 1 if diagnosis.problems else 0
