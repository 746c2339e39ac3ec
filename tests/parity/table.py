"""Renders what a full run found (``PARITY_JSON=FILE pytest tests/parity``) as ``docs/compatibility.md``.

``python -m tests.parity.table [FILE [PAGE]]``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.parity.bases import ARCHITECTURES

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"

# PEFT's own mixed batch, vLLM, SGLang, LoRAX. "?" is a case that nobody looked at.
_YES = ("yes", "yes", "yes", "yes")
_UNKNOWN = ("yes", "?", "?", "?")
_ALPHA = ("yes", "yes", "ignored", "ignored")
_LAYERS = ("yes", "yes", "yes", "drops the whole kind of layer")
_INIT = ("changes its neighbours", "refused", "wrong", "wrong")
_RECORDED = ("wrong or an error", "refused", "wrong", "wrong")
_DORA = ("refused", "refused", "refused", "ignored")
_BIAS = ("one adapter, leaks into others", "refused", "ignored", "ignored")
_TOKENS = ("error", "refused", "dropped", "dropped")
_SAVED = ("error", "refused", "dropped", "dropped")
_SAVED_TABLE = ("equal shapes", "refused", "dropped", "dropped")
_METHOD = ("refused", "refused", "refused", "error")
_EXPERTS = ("error", "yes", "yes", "partly")
_ACTIVATED = ("yes", "refused", "ignored", "ignored")
_VISION = ("yes", "no", "no", "no")

PEERS: Mapping[str, tuple[str, str, str, str]] = {
    "plain LoRA": _YES,
    "plain LoRA, base's own head": _UNKNOWN,
    "rank_pattern": ("yes", "yes", "error at first use", "error"),
    "rank_pattern, alpha_pattern: anchored, regex": ("yes", "yes", "error or ignored", "error or ignored"),
    "alpha_pattern: overlapping": _ALPHA,
    "alpha_pattern: dotted": _ALPHA,
    "use_rslora": ("yes", "yes", "wrong", "yes"),
    "use_rslora with patterns": ("yes", "yes", "wrong", "error"),
    "target_modules: one full path": _LAYERS,
    "layers_to_transform": _LAYERS,
    "layers_pattern": _LAYERS,
    "exclude_modules": _LAYERS,
    "target_modules: regex": _UNKNOWN,
    "target_modules: all-linear": _UNKNOWN,
    "LoRA on lm_head": _YES,
    "LoRA on the pooler": _UNKNOWN,
    "negative lora_alpha": _UNKNOWN,
    "lora_alpha 0": _UNKNOWN,
    "float lora_alpha": _UNKNOWN,
    "init: gaussian, orthogonal, MiCA, EVA": _UNKNOWN,
    "VeLoRA, MonteCLoRA (training only)": _UNKNOWN,
    "lora_dropout (training only)": _YES,
    "file in float16": _UNKNOWN,
    "file in bfloat16": _UNKNOWN,
    "lora_bias": ("?", "refused", "ignored", "ignored"),
    "bias: all": _BIAS,
    "bias: lora_only": _BIAS,
    "bias with DoRA": _DORA,
    "use_dora": _DORA,
    "use_dora with use_rslora": _DORA,
    "use_dora with PiSSA": _DORA,
    "use_dora on embeddings": _DORA,
    "use_dora on convolutions": ("refused", "no", "no", "no"),
    "LoRA on embeddings": ("yes", "yes", "yes", "no"),
    "LoRA on tied embeddings, ensure_weight_tying": ("yes", "?", "?", "no"),
    "LoRA on position embeddings": ("error", "?", "?", "no"),
    "LoRA on convolutions": _VISION,
    "KaSA": ("changes its neighbours", "?", "?", "?"),
    "BD-LoRA": ("?", "refused", "ignored", "ignored"),
    "init: PiSSA": _INIT,
    "init: OLoRA": _INIT,
    "init: pissa_niter, initial adapter kept": _RECORDED,
    "init: CorDA, initial adapter kept": _RECORDED,
    "init: LoRA-GA, initial adapter kept": _RECORDED,
    "converted at saving": _YES,
    "target_parameters": _EXPERTS,
    "target_parameters with target_modules": _EXPERTS,
    "trainable_token_indices": _TOKENS,
    "modules_to_save: the task's head": (
        "linear heads of equal size",
        "linear heads, named by the base",
        "dropped",
        "dropped",
    ),
    "modules_to_save: pooler": _SAVED,
    "modules_to_save: norms": _SAVED,
    "modules_to_save: a whole layer": _SAVED,
    "modules_to_save: embeddings": _SAVED_TABLE,
    "modules_to_save: lm_head": _SAVED_TABLE,
    "modules_to_save: lm_head and embeddings": _SAVED_TABLE,
    "modules_to_save, ensure_weight_tying": _SAVED_TABLE,
    "aLoRA": _ACTIVATED,
    "aLoRA with lora_bias": _ACTIVATED,
    "aLoRA with bias": _ACTIVATED,
    "aLoRA with a saved lm_head": _ACTIVATED,
    "keys with the backbone's name": ("ignored", "?", "?", "?"),
    "written by transformers 4": ("drops the attention", "no", "no", "no"),
    "IA3": _METHOD,
    "AdaLoRA": ("refused", "refused", "refused", "?"),
    "LN_TUNING": _METHOD,
    "TRAINABLE_TOKENS": _METHOD,
    "VeRA, projections saved": _METHOD,
    "LoHa": _METHOD,
    "LoKr": _METHOD,
    "OFT": _METHOD,
}
_MARKS = {("exact",): "●", ("refused",): "○", ("exact", "refused"): "◐"}

_HEAD = """# Which adapters are served, and how that is known

One line for each kind of PEFT configuration. "exact" means: in {adapters} adapters of {configurations} configurations
({architectures} architectures, five seeds each), in batches where every row had another adapter, every logit equalled
PEFT 0.21.2 with that adapter alone on a fresh base, to 2e-4 of the largest logit, and the base was the same afterwards,
bit for bit. Where PEFT's own float32 rounding is larger than that, its answer in float64 is the measure; where PEFT
restores its own file wrongly, the model that was saved.
Everything else is refused at registration, with all reasons.

The others, as of 2026-11: PEFT's own mixed batch (`adapter_names`) in 0.21.2, vLLM 0.33, SGLang 0.5.23, LoRAX
(predibase/lorax of 2026-05-28). "ignored", "dropped" and "wrong" give no message; "?" was not examined; "no" has no
place for it. Much was read in their sources rather than run: tell us where we are mistaken.

Written by `python -m tests.parity.table`; do not edit.
"""


def render(found: Mapping[str, Any]) -> str:
    """The page; raises KeyError for a line that nothing is said about."""
    table: Mapping[str, Mapping[str, list[str]]] = found["table"]
    names = [name for name in ARCHITECTURES if any(name in cells for cells in table.values())]
    head = _HEAD.format(adapters=found["adapters"], configurations=found["configurations"], architectures=len(names))
    rows = [row for row in PEERS if row in table] + sorted(set(table) - set(PEERS))
    first = [(row, _summary(table[row]), *PEERS[row]) for row in rows]
    second = [(row, *(_mark(table[row].get(name)) for name in names)) for row in rows]
    return "\n".join(
        [
            head,
            _markdown(("configuration", "here", "PEFT mixed", "vLLM", "SGLang", "LoRAX"), first),
            "\n## By architecture\n",
            "● exact, ○ refused, ◐ some of each, blank: has no meaning there.\n",
            _markdown(("configuration", *names), second),
            "",
        ]
    )


def _summary(cells: Mapping[str, Sequence[str]]) -> str:
    outcomes = {outcome for found in cells.values() for outcome in found}
    if outcomes == {"exact", "refused"}:
        some = sorted(name for name, found in cells.items() if "refused" in found)
        return f"exact; refused on {', '.join(some)}"
    return " and ".join(sorted(outcomes))


def _mark(outcomes: Sequence[str] | None) -> str:
    return "" if outcomes is None else _MARKS.get(tuple(outcomes), "WRONG")


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: Sequence[str]) -> None:
    source, page = [*map(Path, arguments), *(RESULTS, PAGE)[len(arguments) :]]
    page.write_text(render(json.loads(source.read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
