"""``adapter-router merge``."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from adapter_router.merging.request import MergeRequest


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("merge", help="make one adapter of several, and say how far it is from their sum")
    parser.add_argument("--base", required=True, help="the base model: a directory, or package:module/subdir")
    parser.add_argument(
        "--adapter",
        nargs=3,
        action="append",
        required=True,
        metavar=("NAME", "DIR", "WEIGHT"),
        help="an adapter: a name for it, its directory (or package:module/subdir), its weight; give it several times",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the directory to make; it must not exist")
    parser.add_argument("--type", default="svd", help="how to merge (docs/merging.md); default svd")
    parser.add_argument(
        "--rank", type=int, help="of the result, for svd and …_svd; default the largest of the adapters'"
    )
    parser.add_argument("--density", type=float, help="share of entries kept, for ties, dare_… and magnitude_prune")
    parser.add_argument("--sign", help="how adapters elect one, for ties and dare_ties: total (default) or frequency")
    parser.add_argument("--seed", type=int, default=0, help="of random drops, for dare_…; default 0")
    parser.add_argument("--head", default="refuse", help="keep=NAME, average, or refuse (default)")
    parser.add_argument("--task", help="what the adapters do, where their files do not say it")
    parser.add_argument("--dry-run", action="store_true", help="do everything but write")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0: merged; 1: refused, with every problem; 2: no base, no room, or a fault of ours."""
    import transformers  # noqa: PLC0415 - only commands on weights need torch in this process

    from adapter_router.errors import AdapterRejected, AdapterRouterError  # noqa: PLC0415
    from adapter_router.merging.loading import WriteFailed  # noqa: PLC0415
    from adapter_router.merging.merge import merge  # noqa: PLC0415

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of adapters and places need not be of its characters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _ended_by_sigterm():
            report = merge(_request(args), args.base, args.out, dry_run=args.dry_run, progress=_tell)
    except AdapterRejected as error:
        return _refuse(error.problems, as_json=args.json)
    except WriteFailed as error:
        print(f"{error.filename} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    except (
        OSError,
        ValueError,
        RuntimeError,
        MemoryError,
        AdapterRouterError,
    ) as error:  # torch's LinAlgError is a RuntimeError
        print(f"merging on {args.base}: {error}", file=sys.stderr)
        return 2
    return _say(json.dumps(report.document(), indent=2) if args.json else "\n".join(report.lines()), 0)


def _say(text: str, status: int) -> int:
    """``status``, or 2 when nobody can be told."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries once more as it ends
        print(f"the report cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    return status


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the command as an exit does, so that what it staged is removed."""

    def leave(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _request(args: argparse.Namespace) -> MergeRequest:
    """What is wrong with a value is told with everything else that is wrong."""
    from adapter_router.merging.request import HeadPolicy, MergeRequest, Part  # noqa: PLC0415

    return MergeRequest(
        parts=tuple(Part(name, directory, _number(weight)) for name, directory, weight in args.adapter),
        type=args.type,
        rank=args.rank,
        density=args.density,
        sign=args.sign,
        seed=args.seed,
        head=HeadPolicy.parse(args.head),
        task=args.task,
    )


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _tell(done: int, total: int, path: str) -> None:
    print(f"{done + 1}/{total} {path}", file=sys.stderr)


def _refuse(problems: Sequence[str], *, as_json: bool) -> int:
    if as_json:
        return _say(json.dumps({"merged": False, "problems": list(problems)}, indent=2), 1)
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return _say("\n".join([f"REFUSED: {count}", *(f"  - {problem}" for problem in problems)]), 1)
