"""``adapter-router adapters``: what a running server is told about its adapters."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from adapter_router.catalog.records import PHASES
from adapter_router.types import TASK_KINDS

_URL = "ADAPTER_ROUTER_URL"
_DEFAULT_URL = "http://127.0.0.1:8000"

_Parser = argparse.ArgumentParser


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its verbs."""
    parser = commands.add_parser("adapters", help="register, watch and change the adapters of a running server")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, (declare, help_) in _VERBS.items():
        verb = verbs.add_parser(name, help=help_)
        declare(verb)
        verb.add_argument(
            "--url",
            default=os.environ.get(_URL) or _DEFAULT_URL,
            help=f"of the server (default: {_URL}, or {_DEFAULT_URL})",
        )
        verb.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0: done; 1: the server refused it, or an adapter failed; 2: no server, or a file cannot be read.

    130: interrupted.
    """
    try:
        from deployments.admin import importing, verbs  # noqa: PLC0415 - only this command needs rich and httpx
        from deployments.admin.client import Refused, Server, Unreachable  # noqa: PLC0415
        from deployments.admin.tables import Screen  # noqa: PLC0415
    except ModuleNotFoundError as error:
        print(f"{error.name} is not installed: pip install 'adapter-router[serve]'", file=sys.stderr)
        return 2
    doing = {
        "add": verbs.add,
        "list": verbs.list_,
        "show": verbs.show,
        "alias": verbs.alias,
        "rollback": verbs.rollback,
        "warm": verbs.warm,
        "pin": verbs.pin,
        "unpin": verbs.pin,
        "rm": verbs.remove,
        "retry": verbs.retry,
        "refresh": verbs.refresh,
        "events": verbs.events,
        "reconcile": verbs.reconcile,
        "capacity": verbs.capacity,
        "import-dir": importing.import_dir,
    }[args.verb]
    screen = Screen(as_json=args.json)
    try:
        with Server(args.url) as server:
            return doing(server, screen, args)
    except Refused as error:
        screen.show(error.document)
        screen.complain(str(error), error.problems)
        return 1
    except Unreachable as error:
        screen.complain(f"{error}\nstart a server with `adapter-router serve`, or say with --url where one is")
    except OSError as error:
        screen.complain(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        screen.complain("interrupted; what the server was told to do, it goes on doing")
        return 130
    return 2


def _add(parser: _Parser) -> None:
    parser.add_argument("name")
    parser.add_argument("uri", help="a directory, package:module/subdir, or hf://, s3://, gs://, az://, https://")
    parser.add_argument("--revision", help="branch, tag or commit at the source")
    parser.add_argument("--sha256", help="what must be found there (docs/adapters.md)")
    _add_declaration(parser)


def _import(parser: _Parser) -> None:
    parser.add_argument("directory", help="a folder that the server sees under the same path")
    parser.add_argument("--prefix", default="", help="before every name")
    _add_declaration(parser)


def _add_declaration(parser: _Parser) -> None:
    parser.add_argument("--base", help="name or fingerprint (default: the one it fits)")
    parser.add_argument("--task", choices=TASK_KINDS, help="where the files do not say it")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="label names, in the order of the head's outputs")
    parser.add_argument("--secret-ref", metavar="NAME", help="of the credentials that the server shall use")
    parser.add_argument("--pinned", action="store_true", help="keep it on every device")
    parser.add_argument("--preload", action="store_true", help="have it on every replica before that one is ready")
    parser.add_argument("--lazy", action="store_true", help="do not even fetch it before its first row")
    parser.add_argument("--replace", action="store_true", help="of an adapter that is registered already: its source")
    _add_no_wait(parser)


def _add_no_wait(parser: _Parser) -> None:
    parser.add_argument("--no-wait", action="store_true", help="do not wait until it is Ready or Failed")


def _list(parser: _Parser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--phase", choices=PHASES)
    which.add_argument("--residency", action="store_true", help="what the replicas hold, instead of what is registered")
    _add_page(parser)
    parser.add_argument("--all", action="store_true", help="every page")


def _add_page(parser: _Parser) -> None:
    parser.add_argument("--limit", type=int, default=100, help="lines at most (default: %(default)s)")
    parser.add_argument("--after", help="go on after this one")


def _alias(parser: _Parser) -> None:
    parser.add_argument("name", nargs="?", help="(default: show all)")
    parser.add_argument(
        "weights", nargs="*", type=_weight, metavar="VERSION=WEIGHT", help="v1=90 v2=10; food@v2=1 for another's"
    )
    parser.add_argument("--if-revision", type=int, metavar="N", help="only if nobody has changed it since revision N")
    parser.add_argument("--delete", action="store_true", help="forget the alias")


def _events(parser: _Parser) -> None:
    parser.add_argument("name", nargs="?", help="(default: of all)")
    parser.add_argument("--limit", type=int, default=100, help="lines at most (default: %(default)s)")
    parser.add_argument(
        "--after",
        type=int,
        metavar="N",
        help="those after revision N (default: the last ones of all; of one adapter the first)",
    )


def _reconcile(parser: _Parser) -> None:
    parser.add_argument("manifest", nargs="?", help="a YAML file, - for standard input (default: the server's own)")
    parser.add_argument("--dry-run", action="store_true", help="only say what differs")


def _refresh(parser: _Parser) -> None:
    _name(parser)
    parser.add_argument("--no-activate", action="store_true", help="the name goes on meaning what it does")


def _retry(parser: _Parser) -> None:
    _name(parser)
    _add_no_wait(parser)


def _remove(parser: _Parser) -> None:
    parser.add_argument("name", help="an adapter, or one version of it: NAME@v2")


def _name(parser: _Parser) -> None:
    parser.add_argument("name")


def _nothing(_: _Parser) -> None:
    pass


def _weight(text: str) -> tuple[str, int]:
    version, separator, weight = text.rpartition("=")
    if not separator or not version or not weight.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not VERSION=WEIGHT")
    return version, int(weight)


_VERBS: dict[str, tuple[Callable[[_Parser], None], str]] = {
    "add": (_add, "register an adapter and wait until it is Ready"),
    "list": (_list, "adapters, or what replicas hold of them"),
    "show": (_name, "one adapter and its versions"),
    "alias": (_alias, "show or change what a name means"),
    "rollback": (_name, "undo the last change of what a name means"),
    "warm": (_name, "load an adapter on all replicas"),
    "pin": (_name, "keep an adapter on every device"),
    "unpin": (_name, "let a pinned adapter be evicted again"),
    "rm": (_remove, "remove an adapter, or retire a version"),
    "retry": (_retry, "fetch and check an adapter anew"),
    "refresh": (_refresh, "look at an adapter's source again: other files are a new version"),
    "events": (_events, "what happened"),
    "reconcile": (_reconcile, "bring the server in line with a manifest, or say how it differs"),
    "capacity": (_nothing, "how much memory is taken, and how many adapters fit"),
    "import-dir": (_import, "register every adapter directory below a folder"),
}
