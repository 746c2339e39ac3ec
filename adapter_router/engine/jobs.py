"""Rows on their way: what runs for each, and how the model's output becomes its answer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from adapter_router.catalog.mixing import spelled
from adapter_router.engine.base_model import BaseModel
from adapter_router.engine.encodings import Encodings
from adapter_router.engine.inputs import EncodedRow
from adapter_router.engine.resident import ResidentAdapter
from adapter_router.engine.tasks.answering import Answerer, Given, Reader, answerer, text_prefix
from adapter_router.errors import AdapterRouterError, InternalError, InvalidRequest, TaskMismatch
from adapter_router.types import AdapterVersion, Array, EmbeddingSettings, Row, RowOutcome, RowResult, TaskKind

logger = logging.getLogger(__name__)

# PEFT's model for question answering (0.21) drops this feature, when it trains and ever after.
_UNSEEN = "token_type_ids"

Key = tuple[str, str, TaskKind, str]
"""What tells versions apart when they are asked for: name, digest, task and base.

One content may have several names, of which one is refused or lies elsewhere: that is no other's fault.
"""


@dataclass(frozen=True)
class Job:
    """One encoded row on its way; ``version`` None is the bare base."""

    index: int
    row: Row
    task: TaskKind
    encoded: EncodedRow
    answer: Answerer
    version: AdapterVersion | None

    @property
    def name(self) -> str | None:
        """Who answers, as the caller knows it; a mix is spelled out."""
        return self.version.adapter if self.version else name_of(self.row)

    @property
    def key(self) -> Key | None:
        """Whose lease it runs with; None for the bare base."""
        version = self.version
        return (version.adapter, version.digest, version.task, version.base) if version else None

    def adapter(self, leased: Mapping[Key, ResidentAdapter]) -> ResidentAdapter | None:
        """Its adapter among ``leased``; None for the bare base."""
        return leased[self.key] if self.key else None


def name_of(row: Row) -> str | None:
    """The name that ``row`` asks for; of a mix, all of it."""
    return row.adapter if isinstance(row.adapter, str | None) else spelled(row.adapter)


class Jobs:
    """Rows for one base."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base

    def job(self, index: int, row: Row, version: AdapterVersion | None, encodings: Encodings) -> Job:
        """``row``, encoded for ``version``; None is the bare base. Raises AdapterRouterError and nothing else."""
        try:
            return self._encoded(index, row, version, encodings)
        except AdapterRouterError:
            raise
        except Exception as error:
            logger.exception("a row of adapter %s cannot be encoded", row.adapter)
            raise InternalError(f"the row cannot be encoded: {type(error).__name__}") from error

    def outcome(self, job: Job, raw: Array) -> RowOutcome:
        """The answer that the model's ``raw`` output for the row is."""
        try:
            return self._result(job, raw)
        except Exception as error:
            logger.exception("a row of adapter %s cannot be answered", job.name)
            return InternalError(f"the output cannot be read as an answer: {type(error).__name__}")

    def _encoded(self, index: int, row: Row, version: AdapterVersion | None, encodings: Encodings) -> Job:
        task = version.task if version else row.task or self._base.tasks[0]
        if row.task is not None and row.task != task:
            raise TaskMismatch(f"adapter {row.adapter!r} serves {task}, not {row.task}", "task")
        if task not in self._base.tasks:
            raise TaskMismatch(f"this base does not serve {task}; it serves {', '.join(self._base.tasks)}", "task")
        try:
            spec = self._base.task(task).spec
        except ValueError as error:
            raise TaskMismatch(f"this base cannot serve {task}: {error}", "task") from error
        if version is None and spec.untrained:
            raise TaskMismatch(f"the bare base has no trained head for {task}; name an adapter", "adapter")
        reader = Reader(
            labels=version.labels if version else spec.labels,
            activation=version.activation if version else spec.activation,
            embedding=version.embedding if version else EmbeddingSettings(),
            hidden_size=self._base.hidden_size,
        )
        if task == "token-classification" and isinstance(row.inputs, tuple):
            raise InvalidRequest("token-classification takes one text, not a pair", "inputs")
        answer = answerer(task, reader, row.parameters)
        encoded = encodings.encode(row, text_prefix(task, reader, row.parameters))
        if version is not None and task == "question-answering":
            encoded = encoded.without(_UNSEEN)
        return Job(index, row, task, encoded, answer, version)

    def _result(self, job: Job, raw: Array) -> RowResult:
        output, logits = job.answer(raw, Given(job.encoded.features, job.encoded.spans))
        if job.version is None:
            return RowResult(output, logits, job.name, self._base.fingerprint, job.encoded.num_tokens)
        parts = tuple((part.version.adapter, part.version.digest, part.weight) for part in job.version.parts)
        return RowResult(output, logits, job.name, job.version.digest, job.encoded.num_tokens, parts=parts)
