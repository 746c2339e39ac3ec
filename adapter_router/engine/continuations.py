"""Rows that a model continues: checked, generated batch by batch, and told as events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from adapter_router.engine.base_model import BaseModel
from adapter_router.engine.generation import Generated, GenerationWork, Generator
from adapter_router.engine.jobs import Job
from adapter_router.engine.leasing import Leases
from adapter_router.engine.tasks.parameters import generation
from adapter_router.errors import AdapterRouterError, InternalError, InvalidRequest, TaskMismatch
from adapter_router.types import GenerationEvent

_GENERATES = ("text-generation", "seq2seq-generation")
_MAX_NEW_TOKENS = 4096


class Continuations:
    """Greedy continuations by rows' adapters."""

    def __init__(self, base: BaseModel, leases: Leases) -> None:
        self._base = base
        self._leases = leases
        self._generator = Generator(base)

    def check(self, job: Job) -> None:
        """Raises TaskMismatch or InvalidRequest for a row that cannot be continued as it asks."""
        if job.task not in _GENERATES:
            raise TaskMismatch(f"adapter {job.name!r} serves {job.task}, which generates nothing", "adapter")
        if isinstance(job.row.inputs, Mapping) and any(name.startswith("decoder_") for name in job.row.inputs):
            raise InvalidRequest("generation starts with the decoder's own start token; leave decoder_* out", "inputs")
        most, limit = generation(job.row.parameters, job.task).max_new_tokens, self._base.encoder.max_tokens
        prompt = job.encoded.num_tokens if job.task == "text-generation" else 0
        if most > _MAX_NEW_TOKENS or prompt + most > limit:
            room = min(_MAX_NEW_TOKENS, limit - prompt)
            raise InvalidRequest(f"max_new_tokens is {most}, this row has room for {room}", "max_new_tokens")

    def events(self, jobs: Sequence[Job]) -> Iterator[GenerationEvent]:
        """One of each row, when all are done."""
        events = []
        for group, leased in self._leases.groups(jobs):
            if isinstance(leased, AdapterRouterError):
                events += [GenerationEvent(job.index, adapter=job.name, error=leased) for job in group]
                continue
            works = [
                GenerationWork(
                    job.encoded,
                    job.adapter(leased),
                    job.task,
                    max_new_tokens=generation(job.row.parameters, job.task).max_new_tokens,
                )
                for job in group
            ]
            # All of them before the first is given out: the caller may never come back for the second.
            events += [self._event(group[index], generated) for index, generated in self._generator.run(works)]
        yield from events

    def _event(self, job: Job, generated: Generated | InternalError) -> GenerationEvent:
        version = job.version.digest if job.version else self._base.fingerprint
        if isinstance(generated, InternalError):
            return GenerationEvent(job.index, adapter=job.name, version=version, error=generated)
        return GenerationEvent(
            index=job.index,
            token_ids=generated.token_ids,
            text=self._base.encoder.detokenize(generated.token_ids),
            finish_reason="stop" if generated.stopped else "length",
            adapter=job.name,
            version=version,
        )
