"""Every error a caller can meet, as one tree; each class carries its code, HTTP status and whether a retry helps.

    AdapterRouterError
    ├── InvalidRequest            400  the request or one row of it is malformed
    │   ├── InputTooLong          400  more tokens than the base model takes
    │   └── AdapterConflict       409  what shall be changed is not what it was any more
    ├── AdapterExists             400  the name is registered already
    ├── AdapterNotFound           404  no adapter or base of that name
    ├── TaskMismatch              422  the adapter serves another task than the one asked for
    ├── AdapterRejected           422  the adapter cannot be served exactly; ``problems`` lists every reason
    ├── AdapterFailed             424  a registered adapter cannot be had or served; ``problems`` repeat the reasons
    ├── InternalError             500  our fault; nothing about it is the caller's
    ├── Overloaded                429  too much waits already; ``retry_after_s`` says when to come again
    ├── DeadlineExceeded          504  the row's time was over before its answer was there
    ├── AdapterUnavailable        503  a registered adapter could not be fetched or read just now
    ├── CatalogUnavailable        503  the catalog's database does not answer
    └── ReplicaLost               503  the replica died, and so did the one that took over

Errors travel between processes (Ray pickles them) and stand in the place of a failed row's result, so a
constructor takes only positional, picklable arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

_MOST_PROBLEMS = 100
_LONGEST_PROBLEM = 2000


def _tidied(problem: str) -> str:
    """One line of printable characters, of bearable length."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in problem[:_LONGEST_PROBLEM])
    return line + "…" * (len(problem) > _LONGEST_PROBLEM)


class AdapterRouterError(Exception):
    """Base of the tree. ``str(error)`` is the message: what is wrong, the limit, and how to mend it."""

    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "InternalServerError"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, param: str | None = None, problems: Sequence[str] = ()) -> None:
        super().__init__(message, param, tuple(problems))
        self.message = message
        self.param = param
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """The error as the JSON body of an HTTP answer."""
        error: dict[str, Any] = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        if self.problems:
            error["problems"] = list(self.problems)
        return {"error": error}


class InvalidRequest(AdapterRouterError):
    code = "invalid_request"
    type = "BadRequestError"
    status = 400


class InputTooLong(InvalidRequest):
    code = "context_length_exceeded"


class AdapterConflict(InvalidRequest):
    code = "conflict"
    type = "ConflictError"
    status = 409


class AdapterExists(AdapterRouterError):
    code = "adapter_exists"
    type = "InvalidUserInput"
    status = 400


class AdapterNotFound(AdapterRouterError):
    code = "model_not_found"
    type = "NotFoundError"
    status = 404


class TaskMismatch(AdapterRouterError):
    code = "task_mismatch"
    type = "UnprocessableEntityError"
    status = 422


class AdapterRejected(AdapterRouterError):
    """``problems`` holds every reason found, not only the first; nothing was registered."""

    code = "adapter_invalid"
    type = "UnprocessableEntityError"
    status = 422

    @classmethod
    def because(cls, problems: Sequence[str]) -> AdapterRejected:
        """An error whose message repeats ``problems``, one a line; names in them come from strangers' files."""
        tidied = [_tidied(problem) for problem in problems[:_MOST_PROBLEMS]]
        if len(problems) > _MOST_PROBLEMS:
            tidied.append(f"and {len(problems) - _MOST_PROBLEMS} more")
        listed = "\n".join(f"  - {problem}" for problem in tidied)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        return cls(f"adapter refused ({count}):\n{listed}", None, tuple(tidied))


class AdapterFailed(AdapterRouterError):
    code = "adapter_failed"
    type = "FailedDependencyError"
    status = 424


class InternalError(AdapterRouterError):
    pass


class Overloaded(AdapterRouterError):
    """``retry_after_s``: seconds until what waits now will have been served."""

    code = "overloaded"
    type = "RateLimitError"
    status = 429
    retryable = True

    def __init__(
        self, message: str, param: str | None = None, problems: Sequence[str] = (), retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message, param, problems)
        self.args = (message, param, tuple(problems), retry_after_s)  # what it is pickled by
        self.retry_after_s = retry_after_s


class DeadlineExceeded(AdapterRouterError):
    code = "deadline_exceeded"
    type = "TimeoutError"
    status = 504
    retryable = True


class AdapterUnavailable(AdapterRouterError):
    code = "adapter_unavailable"
    type = "ServiceUnavailableError"
    status = 503
    retryable = True


class CatalogUnavailable(AdapterRouterError):
    code = "catalog_unavailable"
    type = "ServiceUnavailableError"
    status = 503
    retryable = True


class ReplicaLost(AdapterRouterError):
    code = "replica_lost"
    type = "ServiceUnavailableError"
    status = 503
    retryable = True
