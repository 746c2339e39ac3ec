"""Errors planted one at a time into a copy of the package: the proof must notice every one of them.

``python -m tests.parity.mutations [name …]``. Each runs in a forked process that imports the copy; torch and PEFT are
imported once. A mutation that nothing notices, or whose text is not found exactly once, fails the run.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "adapter_router"

SURVIVED, NOTICED, CRASHED = 0, 1, 2


@dataclass(frozen=True)
class Case:
    """What to run: rows of ``recipes``.

    Or generation, the last bit, or mixes, where ``recipes`` says "tokens", a dtype, or "mixes" and which to mix.
    """

    architecture: str
    task: str
    seed: int
    recipes: tuple[str, ...]


def case(architecture: str, task: str, seed: int, *recipes: str) -> Case:
    return Case(architecture, task, seed, recipes)


BERT, ROBERTA, VIT = (
    ("bert", "text-classification", 1),
    ("roberta", "text-classification", 1),
    ("vit", "image-classification", 1),
)
GPT2, LLAMA, TIED = ("gpt2", "text-generation", 1), ("llama", "text-generation", 1), ("llama", "text-generation", 0)
MIXTRAL, GEMMA = ("mixtral", "text-generation", 1), ("gemma3", "text-generation", 1)
_MIXED_NORMS = case(*BERT, "mixes", "save-norm", "plain", "rslora")
_MIXES, _MIXED_EXPERTS = case(*BERT, "mixes"), case(*MIXTRAL, "mixes", "experts-one", "experts-both", "plain")


@dataclass(frozen=True)
class Mutation:
    """``old`` in ``file`` becomes ``new``; ``case`` must notice."""

    name: str
    file: str
    old: str
    new: str
    case: Case


def _m(name: str, file: str, old: str, new: str, what: Case) -> Mutation:
    return Mutation(name, file, old, new, what)


_CONFIG, _COVER, _CONVERT = "adapters/adapter_config.py", "adapters/coverage/experts.py", "adapters/convert.py"
_TOKENS_CHECK = "adapters/coverage/tokens.py"
_LORA, _DELTAS, _PLAN, _FORWARD = "adapters/tuners/lora.py", "engine/deltas.py", "engine/plan.py", "engine/forward.py"
_PATTERNS, _WEIGHTS, _KERNELS = "adapters/patterns.py", "adapters/base_weights.py", "engine/kernels.py"
_SUM = "adapters/weighted_sum.py"
_RESIDENT, _LAYERS, _GENERATE = "engine/resident.py", "engine/layers.py", "engine/generation.py"

MUTATIONS: tuple[Mutation, ...] = (
    # scale and rank
    _m("rslora ignored", _CONFIG, "(math.sqrt(rank) if self.use_rslora else rank)", "rank", case(*BERT, "rslora")),
    _m(
        "square root of the rank everywhere",
        _CONFIG,
        "(math.sqrt(rank) if self.use_rslora else rank)",
        "math.sqrt(rank)",
        case(*BERT, "plain", "rank-pattern"),
    ),
    _m("scale left out", _RESIDENT, "b = b * delta.scaling", "b = b * 1.0", case(*BERT, "plain", "alpha-negative")),
    _m(
        "last pattern instead of the first",
        _CONFIG,
        "self.alpha_pattern[keys[0]] if keys else",
        "self.alpha_pattern[keys[-1]] if keys else",
        case(*BERT, "overlapping-alpha"),
    ),
    _m(
        "patterns match inside a name",
        _PATTERNS,
        'rf"(.*\\.)?({key})$"',
        'rf".*({key})$"',
        case(*BERT, "dotted-alpha"),
    ),
    _m(
        "patterns match whole paths only",
        _PATTERNS,
        'rf"(.*\\.)?({key})$"',
        'rf"({key})$"',
        case(*BERT, "dotted-alpha"),
    ),
    _m(
        "scale from the configuration's rank, not the pattern's",
        _LORA,
        "target.config.scaling_of(target.path, target.config.rank_of(target.path))",
        "target.config.scaling_of(target.path, target.config.r)",
        case(*BERT, "rank-pattern"),
    ),
    # biases
    _m("lora_bias not scaled", _LORA, '["b_bias"].float() * scaling', '["b_bias"].float()', case(*BERT, "lora-bias")),
    _m(
        "a saved bias is added to the base's",
        _CONVERT,
        "bias.float() - (0 if own is None else own)",
        "bias.float()",
        case(*BERT, "bias-all"),
    ),
    _m(
        "a saved bias hides DoRA's",
        _CONVERT,
        "difference if delta.shift is None else delta.shift + difference",
        "difference",
        case(*BERT, "bias-dora"),
    ),
    _m(
        "biases of norms forgotten",
        _DELTAS,
        "        _gain_and_shift(rows[segment.start : segment.stop], delta)",
        "        pass",
        case(*BERT, "bias-all"),
    ),
    # DoRA
    _m(
        "DoRA's gain on the bias",
        _LORA,
        "None if bias is None else (1 - gain) * bias",
        "None",
        case(*BERT, "dora"),
    ),
    _m(
        "DoRA's norm of the base alone",
        _LORA,
        "(weight.flatten(1) + product).norm(dim=1)",
        "weight.flatten(1).norm(dim=1)",
        case(*BERT, "dora"),
    ),
    _m(
        "DoRA's norm without the scale",
        _LORA,
        "delta.a.float().flatten(1) * delta.scaling\n    norm",
        "delta.a.float().flatten(1)\n    norm",
        case(*BERT, "dora-rslora"),
    ),
    _m("DoRA's gain forgotten", _DELTAS, "        y *= delta.gain", "        y *= 1", case(*BERT, "dora", "ia3")),
    _m(
        "DoRA of an embedding by rows",
        _LORA,
        'if target.spec.kind == "embedding":\n        weight = weight.t()',
        'if target.spec.kind == "embedding":\n        weight = weight.t().flip(1)',
        case(*BERT, "dora-embedding"),
    ),
    # initialisations that changed the base
    _m(
        "PiSSA without what it took",
        _LORA,
        "if taken is None or",
        "if taken is taken or",
        case(*BERT, "pissa"),
    ),
    _m("what was taken is added", _LORA, "-taken.b.float()]", "taken.b.float()]", case(*BERT, "pissa", "olora")),
    _m(
        "PiSSA takes the smallest components",
        _LORA,
        "return weights.largest(target.base_path, rank)",
        "return weights.smallest(target.base_path, rank)",
        case(*BERT, "pissa"),
    ),
    _m(
        "KaSA drops the largest components",
        _LORA,
        "return weights.smallest(target.base_path, rank)",
        "return weights.largest(target.base_path, rank)",
        case(*BERT, "kasa"),
    ),
    _m(
        "KaSA without its diagonal",
        _LORA,
        'a.float() * tensors["diag"].float()[:, None]',
        "a.float()",
        case(*BERT, "kasa"),
    ),
    _m("OLoRA not scaled", _LORA, "basis.b * scaling", "basis.b", case(*BERT, "olora")),
    _m(
        "the initial adapter not scaled",
        _LORA,
        'tensors["b0"].float() * scaling',
        'tensors["b0"].float()',
        case(*BERT, "lora-ga", "corda"),
    ),
    _m(
        "Conv1D's weight not turned",
        _WEIGHTS,
        "return weight.t() if self._targets[path].transposed else weight",
        "return weight",
        case(*GPT2, "pissa", "dora"),
    ),
    # shapes and kinds
    _m(
        "diagonal blocks in reverse",
        _LORA,
        "blocks.chunk(count))  #",
        "blocks.chunk(count)[::-1])  #",
        case(*BERT, "block-diagonal"),
    ),
    _m("a dense change turned", _RESIDENT, "place(delta.dense.t())", "place(delta.dense)", case(*BERT, "oft", "lokr")),
    _m(
        "Gemma's embedding scale forgotten",
        _DELTAS,
        'getattr(module, "embed_scale", 1.0)',
        "1.0",
        case(*GEMMA, "embedding", "token-list"),
    ),
    _m(
        "token rows added to an embedding",
        _DELTAS,
        "y[hits] = delta.token_rows",
        "y[hits] += delta.token_rows",
        case(*LLAMA, "token-list"),
    ),
    _m(
        "token rows added to a tied head",
        _DELTAS,
        "y[..., delta.token_ids] = x @",
        "y[..., delta.token_ids] += x @",
        case(*TIED, "token-list"),
    ),
    _m(
        "token rows not tied",
        _TOKENS_CHECK,
        "self.tokens = {**dict.fromkeys(self._findings.base.tied, replaced), **self.tokens}",
        "pass",
        case(*TIED, "token-list"),
    ),
    _m(
        "experts' B read as experts by rank",
        _CONVERT,
        "expert.b.reshape(expert.b.shape[0], -1, expert.count).permute(2, 0, 1)",
        "expert.b.reshape(expert.b.shape[0], expert.count, -1).permute(1, 0, 2)",
        case(*MIXTRAL, "experts-both"),
    ),
    _m(
        "experts' parameters nested the other way",
        _COVER,
        "leaves[len(leaves) - 1 - depth]",
        "leaves[depth]",
        case(*MIXTRAL, "experts-both"),
    ),
    _m(
        "experts merged into the base",
        _RESIDENT,
        "(parameters[name].float() + delta.dense()).to(parameters[name].dtype)",
        "parameters[name].data.add_(delta.dense())",
        case(*MIXTRAL, "experts-both"),
    ),
    _m(
        "a name of transformers 4 forgotten",
        "adapters/naming.py",
        '(r"\\.mlp\\.fc1$", ".intermediate.dense")',
        '(r"\\.mlp\\.fc1$", ".intermediate.fc1")',
        case(*VIT, "v4-everything"),
    ),
    # other methods
    _m(
        "AdaLoRA without its diagonal",
        "adapters/tuners/adalora.py",
        'tensors["a"].float() * tensors["e"].float()',
        'tensors["a"].float()',
        case(*BERT, "adalora"),
    ),
    _m(
        "AdaLoRA scaled by the rank that is left",
        "adapters/tuners/adalora.py",
        "(_initial_rank(target) + 1e-5)",
        "(rank + 1e-5)",
        case(*BERT, "adalora-pruned"),
    ),
    _m(
        "IA3 always scales the output",
        "adapters/tuners/ia3.py",
        "ModuleDelta(input_scale=scale) if _scales_input(target) else ModuleDelta(gain=scale)",
        "ModuleDelta(gain=scale)",
        case(*BERT, "ia3"),
    ),
    _m(
        "LoHa's factors crossed",
        "adapters/tuners/loha.py",
        "(w1_b[:, None] * w2_b[None])",
        "(w1_b[None] * w2_b[:, None])",
        case(*BERT, "loha"),
    ),
    _m(
        "LoKr's factors swapped",
        "adapters/tuners/lokr.py",
        "torch.kron(right1, right2)",
        "torch.kron(right2, right1)",
        case(*BERT, "lokr", "lokr-decomposed"),
    ),
    _m(
        "OFT's rotation the other way", "adapters/tuners/oft.py", '"onc,nkc->onk"', '"onc,nck->onk"', case(*BERT, "oft")
    ),
    _m(
        "OFT's series cut one term short",
        "adapters/tuners/oft.py",
        "max(terms, 4) - 1",
        "max(terms, 4) - 2",
        case(*BERT, "oft"),
    ),
    _m(
        "VeRA without d",
        "adapters/tuners/vera.py",
        'tensors["d"].float()[:, None] * a',
        "a",
        case(*BERT, "vera"),
    ),
    # rows
    _m(
        "the neighbour's factors",
        _KERNELS,
        "scratch.stack([segment.b for segment in members])",
        "scratch.stack([members[0].b for segment in members])",
        case(*BERT, "plain", "regex", "unordered", "excluded-regex", "gaussian", "dropout"),
    ),
    _m(
        "the neighbour's head",
        _PLAN,
        "groups.append((adapter.heads[path], [segment]))",
        "groups.append((next(s.adapter.heads[path] for s in self.segments if s.adapter and path in s.adapter.heads), "
        "[segment]))",
        case(*BERT, "save-norm", "plain", "rslora"),
    ),
    _m(
        "the neighbour's changes for the bare base",
        _PLAN,
        "s.adapter.deltas.get(path) if s.adapter else None",
        "(s.adapter or next(t.adapter for t in self.segments if t.adapter)).deltas.get(path)",
        case(*BERT, "plain", "rslora"),
    ),
    _m(
        "answers in the order of computation",
        _FORWARD,
        "in zip(made.order[segment.start : segment.stop], raw",
        "in zip(range(segment.start, segment.stop), raw",
        case(*VIT, "headless", "converted-pissa", "converted-niter", "converted-olora"),
    ),
    _m(
        "the other end of a padded row",
        _FORWARD,
        "raw[: work.encoded.num_outputs]",
        "raw[-work.encoded.num_outputs :]",
        case(*LLAMA, "plain", "rslora", "dora"),
    ),
    _m(
        "changes inside a module that others replaced are lost",
        _LAYERS,
        "with self._active.running(plan.narrowed(segments)):",
        "with self._active.running(None):",
        case(*BERT, "save-layer", "plain", "rslora", "dora"),
    ),
    _m(
        "aLoRA's bias on the whole row",
        _LORA,
        "replace(plain, active_shift=shift) if activated else",
        "replace(plain, shift=shift) if activated else",
        case(*LLAMA, "activated-bias"),
    ),
    # rounding
    _m(
        "rounded twice",
        _KERNELS,
        "y_run += torch.bmm(shrunk, stacked) * scaling",
        "y_run += (torch.bmm(shrunk, stacked) * scaling).bfloat16()",
        case("bert", "text-classification", 1, "bfloat16"),
    ),
    _m(
        "LoRA in the base's precision",
        _KERNELS,
        "scratch.stack([segment.a for segment in members]))",
        "scratch.stack([segment.a for segment in members])).bfloat16().float()",
        case("bert", "text-classification", 1, "bfloat16"),
    ),
    # aLoRA and generation
    _m(
        "aLoRA from the first invocation",
        _FORWARD,
        "range(len(ids) - len(wanted), -1, -1)",
        "range(len(ids) - len(wanted) + 1)",
        case(*LLAMA, "activated", "activated-rslora", "activated-head"),
    ),
    _m(
        "aLoRA from behind the invocation",
        _FORWARD,
        "next((start for start in starts",
        "next((start + len(wanted) for start in starts",
        case(*LLAMA, "activated"),
    ),
    _m("aLoRA without invocation", _FORWARD, "== wanted), NEVER)", "== wanted), 0)", case(*LLAMA, "tokens")),
    _m(
        "aLoRA's start not moved by the padding",
        _GENERATE,
        "start += width - work.encoded.num_tokens",
        "start += 0",
        case(*LLAMA, "tokens"),
    ),
    _m(
        "aLoRA asleep while decoding",
        _PLAN,
        "positions = positions + self.width - 1",
        "positions = positions + 0",
        case(*LLAMA, "tokens"),
    ),
    # mixes
    _m("weights ignored", _SUM, "torch.tensor(weight, dtype=torch.float64)", "torch.tensor(1.0).double()", _MIXES),
    _m("alpha of a part ignored", _SUM, "_before_gain(d, w, gain) * d.scaling", "_before_gain(d, w, gain)", _MIXES),
    _m("a sum's gain multiplied twice", _SUM, "delta.gain.double()) / gain", "delta.gain.double())", _MIXES),
    _m("a sum's gain unweighted", _SUM, "torch.stack([w * (d.gain", "torch.stack([(d.gain", _MIXES),
    _m("biases of a sum unweighted", _SUM, "(d.shift, torch.tensor(w))", "(d.shift, torch.tensor(1.0))", _MIXES),
    _m("saved norms unweighted", _SUM, "sum(weight * (module[name]", "sum((module[name]", _MIXED_NORMS),
    _m("saved norms of the head's alone", _SUM, "if not spec.is_head(path):", "if False:", _MIXED_NORMS),
    _m("somebody else's head", _SUM, "parts[head].delta.saved", "parts[0].delta.saved", _MIXES),
    _m("experts of a sum unweighted", _SUM, "(delta.scaling * weight)", "delta.scaling", _MIXED_EXPERTS),
)


def planted(mutation: Mutation, directory: Path) -> None:
    """A copy of the package in ``directory`` with the one error in it."""
    shutil.copytree(PACKAGE, directory / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    path = directory / PACKAGE.name / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.name}: its text stands {text.count(mutation.old)} times in {mutation.file}")
    path.write_text(text.replace(mutation.old, mutation.new))


def run_forked(check: Callable[[], int]) -> int:
    """What ``check`` returns in a process of its own."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = CRASHED
    try:
        code = check()
    except AssertionError:  # the base was changed
        code = NOTICED
    except Exception:
        traceback.print_exc(limit=-2)
    finally:
        os._exit(code)


def examine(what: Case, package: Path, quiet: bool) -> int:
    """Run ``what`` on the package in ``package``; call it in a fork."""
    sys.path.insert(0, str(package))
    import adapter_router  # noqa: PLC0415
    from tests.parity import conftest, mixing, proofs  # noqa: F401, PLC0415

    assert Path(adapter_router.__file__).is_relative_to(package)
    if quiet:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with tempfile.TemporaryDirectory() as scratch:
        place = (what.architecture, what.task)
        if what.recipes == ("tokens",):
            problems = proofs.in_generation(*place, what.seed, Path(scratch))
        elif what.recipes[0] == "mixes":
            _, problems = mixing.in_mixes(*place, what.seed, Path(scratch), what.recipes[1:] or None)
        elif what.recipes[0] in ("bfloat16", "float16"):
            problems = proofs.to_the_last_bit(*place, what.recipes[0], Path(scratch))
        else:
            _, problems = proofs.in_mixed_batches(*place, what.seed, Path(scratch), what.recipes)
    for problem in problems[:1]:
        _say(f"      {problem[:150]}")
    return NOTICED if problems else SURVIVED


def _warm_up() -> None:
    """Import what every fork needs, but nothing of our own."""
    import peft  # noqa: F401, PLC0415
    import torch  # noqa: PLC0415
    import transformers  # noqa: F401, PLC0415
    from peft.tuners.lora import corda, eva, loraga  # noqa: F401, PLC0415

    torch.set_num_threads(1)
    assert "adapter_router" not in sys.modules


def survivors(mutations: Sequence[Mutation]) -> list[str]:
    """Names of mutations that nothing noticed, or whose case fails without them."""
    found = []
    sound: dict[Case, bool] = {}
    for mutation in mutations:
        if mutation.case not in sound:
            sound[mutation.case] = (
                run_forked(lambda m=mutation: examine(m.case, PACKAGE.parent, quiet=False)) == SURVIVED
            )
        with tempfile.TemporaryDirectory() as directory:
            try:
                planted(mutation, Path(directory))
            except ValueError as error:
                _say(f"NOT PLANTED: {error}")
                found.append(mutation.name)
                continue
            outcome = run_forked(lambda m=mutation, d=directory: examine(m.case, Path(d), quiet=True))
        words = {SURVIVED: "SURVIVED", NOTICED: "noticed", CRASHED: "noticed by a crash"}
        _say(f"{words.get(outcome, outcome)}{'' if sound[mutation.case] else ', BUT SO IS NOTHING'}: {mutation.name}")
        if outcome == SURVIVED or not sound[mutation.case]:
            found.append(mutation.name)
    return found


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(names: Sequence[str]) -> int:
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    _warm_up()
    chosen = [mutation for mutation in MUTATIONS if not names or mutation.name in names]
    left = survivors(chosen)
    _say(f"{len(left)} of {len(chosen)} survived: {', '.join(left)}" if left else f"all {len(chosen)} noticed")
    return 1 if left else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
