"""``adapter-router quantize``."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from adapter_router.types import TASK_KINDS


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("quantize", help="write a quantised base and the adapter that training starts from")
    parser.add_argument("base", help="the base model: a directory, or package:module/subdir")
    parser.add_argument("--method", choices=["loftq"], default="loftq", help="arXiv:2310.08659")
    parser.add_argument("--bits", type=int, default=4, help="2, 3, 4, 8, or 16 for a layer left as it is (default 4)")
    parser.add_argument(
        "--bits-pattern",
        nargs="+",
        action="extend",
        type=_pattern,
        default=[],
        metavar="REGEX=BITS",
        help="other bits for layers whose path an expression matches at its end; the first that matches decides",
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument(
        "--target-modules", nargs="+", action="extend", default=[], metavar="NAME", help="default: all linear layers"
    )
    parser.add_argument("--task", choices=TASK_KINDS, help="whose model PEFT will train (default: the base's own)")
    parser.add_argument("--device", default="auto", help="for the decompositions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="a directory that does not exist yet")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0: written; 1: nothing is, every reason is said; 2: the base cannot be had."""
    import transformers  # noqa: PLC0415 - only commands on weights need torch in this process
    from safetensors import SafetensorError  # noqa: PLC0415

    from adapter_router.quantize import InvalidOrder, Order, quantize  # noqa: PLC0415

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    twice = [key for key, count in Counter(key for key, _ in args.bits_pattern).items() if count > 1]
    if twice:
        print(f"REFUSED {args.base}\n  - bits-pattern names twice: {', '.join(twice)}", file=sys.stderr)
        return 1
    order = Order(
        base=args.base,
        out=args.out,
        bits=args.bits,
        bits_pattern=dict(args.bits_pattern),
        rank=args.rank,
        iterations=args.iterations,
        targets=tuple(args.target_modules),
        task=args.task,
        device=args.device,
        seed=args.seed,
    )
    try:
        report = quantize(order, lambda line: print(line, file=sys.stderr if args.json else sys.stdout, flush=True))
    except InvalidOrder as refusal:
        print(f"REFUSED {args.base}", *(f"  - {problem}" for problem in refusal.problems), sep="\n", file=sys.stderr)
        return 1
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        print(f"base {args.base}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.document(), indent=2) if args.json else "\n".join(report.lines()))
    return 0


def _pattern(text: str) -> tuple[str, int]:
    expression, separator, bits = text.rpartition("=")
    if not separator or not bits.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not REGEX=BITS")
    return expression, int(bits)
