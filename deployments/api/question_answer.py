"""``POST /v1/question-answer``: the stretches of a context that answer a question."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from adapter_router.types import Row
from deployments.api.caller import CurrentCaller
from deployments.api.envelope import Text, TextRequest, envelope

routes = APIRouter()

_Positive = Annotated[int, Field(ge=1)]


class QuestionAnswerRequest(TextRequest):
    """One question about one context; ``max_answer_len`` counts tokens."""

    question: Text
    context: Text
    top_k: _Positive = 1
    max_answer_len: _Positive = 15
    handle_impossible_answer: bool = False

    def row(self) -> Row:
        parameters = {
            "truncate_prompt_tokens": self.truncate_prompt_tokens,
            "top_k": self.top_k,
            "max_answer_len": self.max_answer_len,
            "handle_impossible_answer": self.handle_impossible_answer,
        }
        return Row(
            (self.question, self.context), self.adapter, "question-answering", parameters, self.head, self.sticky_key
        )


@routes.post("/v1/question-answer")
async def question_answer(request: QuestionAnswerRequest, caller: CurrentCaller) -> dict[str, Any]:
    """Answer one question with one adapter."""
    results = await caller.answer([request.row()], request.priority)
    return envelope("question-answer", request, results, **results[0].output)
