"""Rows of embeddings that an adapter replaces, and the tokens that switch one on (aLoRA)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from adapter_router.adapters.coverage.findings import Findings, tails
from adapter_router.adapters.keys import Tensors, listed
from adapter_router.adapters.tuners.tuner import Target

_MAX_INVOCATION = 1000


class TokenCheck:
    """``tokens``: row numbers and rows by module; ``invocation``: tokens of an aLoRA adapter."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self.tokens: dict[str, tuple[tuple[int, ...], torch.Tensor]] = {}
        self.invocation: tuple[int, ...] = ()

    def run(self, tokens: Tensors, targets: Collection[Target]) -> None:
        """``tokens`` as the file spells their modules."""
        self._check_tokens(tokens, {target.base_path for target in targets})
        self._check_invocation(targets)

    def _check_tokens(self, tokens: Tensors, targets: set[str]) -> None:
        indices = self._findings.config.document.get("trainable_token_indices") or self._findings.config.document.get(
            "token_indices"
        )
        wanted: dict[str, tuple[int, ...]] = {}
        for name in tokens:
            path = self._findings.naming.actual(name)
            if path is not None:
                wanted[path] = self._token_ids(indices, name)
        if tokens and not indices:
            self._findings.problems.append(
                f"rows of tokens of {listed(tokens)}, but the configuration names no token indices"
            )
        if indices and not tokens:
            self._findings.problems.append(
                "the configuration names token indices, but the file has no trainable_tokens_delta"
            )
        if isinstance(indices, dict) and len(wanted) < len(indices):
            self._findings.problems.append(
                f"token indices are given for {listed(map(str, indices))}, but rows only for {listed(sorted(wanted))}"
            )
        for name, rows in tokens.items():
            path = self._findings.naming.actual(name)
            if path is None:
                continue
            self._check_token_rows(path, wanted[path], rows)
        replaced = self.tokens.get(self._findings.base.embedding or "")
        if replaced is not None:
            self.tokens = {**dict.fromkeys(self._findings.base.tied, replaced), **self.tokens}
        for path in sorted(targets & set(self.tokens)):
            self._findings.problems.append(
                f"{path} has both replaced rows and {self._findings.config.peft_type}; PEFT has no rule for it"
            )

    def _token_ids(self, indices: Any, name: str) -> tuple[int, ...]:
        if isinstance(indices, dict):
            indices = next((ids for key, ids in indices.items() if str(key) in tails(name)), [])
        good = isinstance(indices, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in indices)
        return tuple(indices) if good else ()

    def _check_token_rows(self, path: str, ids: tuple[int, ...], rows: torch.Tensor) -> None:
        shape = self._findings.base.parameters.get(f"{path}.weight", ())
        if not self._names_tokens(path):
            self._findings.problems.append(
                f"the file replaces rows of {path}, which the configuration's token indices are not for"
            )
        if len(shape) != 2 or path not in self._findings.base.targets:
            self._findings.problems.append(f"{path} is no embedding whose rows could be replaced")
        elif len(set(ids)) != len(ids) or not all(0 <= index < shape[0] for index in ids):
            self._findings.problems.append(f"{path}: token indices must be different and lie in 0 to {shape[0] - 1}")
        elif tuple(rows.shape) != (len(ids), shape[1]):
            self._findings.misshaped(f"{path}.trainable_tokens_delta", tuple(rows.shape), (len(ids), shape[1]))
        else:
            self.tokens[path] = (ids, rows)

    def _names_tokens(self, path: str) -> bool:
        """Whether the configuration's token numbers are rows of ``path``: a plain list means the input embedding's."""
        if path in self._findings.base.tied:
            return True  # PEFT replaces them wherever the table's weight is used
        if self._findings.config.peft_type == "TRAINABLE_TOKENS":
            return self._findings.config.targets(self._findings.naming.spelled(path))
        by_name = isinstance(self._findings.config.document.get("trainable_token_indices"), dict)
        return by_name or path == self._findings.base.embedding

    def _check_invocation(self, targets: Collection[Target]) -> None:
        tokens = self._findings.config.document.get("alora_invocation_tokens")
        if not tokens:
            return
        good = isinstance(tokens, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in tokens)
        self.invocation = tuple(tokens) if good else ()
        if not good or len(tokens) > _MAX_INVOCATION:
            self._findings.problems.append(
                f"alora_invocation_tokens must be a list of at most {_MAX_INVOCATION} token ids"
            )
        if self._findings.base.task != "text-generation":
            self._findings.problems.append(
                f"alora_invocation_tokens belong to causal language models, the task is {self._findings.base.task}"
            )
        if self._findings.config.document.get("use_dora") or any(t.spec.kind != "linear" for t in targets):
            self._findings.problems.append("alora_invocation_tokens act on linear layers without use_dora only")
