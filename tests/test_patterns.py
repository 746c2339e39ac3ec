"""A key that is only text is compared as text: what it matches is what PEFT's expression matches."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adapter_router.adapters.patterns import Matcher, _Tail

_PATHS = st.lists(st.sampled_from(["a", "b", "layer", "0", "10", "q_proj", "a-b", "x y", "é", "a\nb", ""])).map(
    ".".join
)
_KEYS = st.lists(
    st.sampled_from(["a", "b", "layer", "0", "10", "q_proj", "-", ".", r"\.", r"\-", r"\ ", r"\$", r"\\", "^", r"\^"]),
    max_size=6,
).map("".join)


def peft(key: str, path: str) -> bool:
    """``peft.utils.other.get_pattern_key``; a path with a line break at its end is no module's."""
    return re.match(rf"(.*\.)?({key})$", path) is not None


@settings(deadline=None, max_examples=3000)
@given(_KEYS, _PATHS)
@example("^a", "b.a")
@example("^a.b", "a.b")
@example("", "a.")
@example("", "")
@example("a.b", "a\nb")
@example("b", "a\nb.b")
@example("q_proj", "xq_proj")
@example(r"0\.q_proj", "10.q_proj")
@example(r"0.q_proj", "0.0.q_proj")
def test_text_matches_what_pefts_expression_matches(key: str, path: str) -> None:
    assert Matcher().matching_keys([key], path) == [key] * peft(key, path)


@given(_KEYS, _PATHS)
@example("a", "a\nb.a")
@example("proj", "q_proj")
@example("a-b", "a-b.0")
def test_saved_modules_are_those_that_pefts_expression_finds(name: str, path: str) -> None:
    """``tuners_utils.check_target_module_exists``; a path with a line break is no module's."""
    found = re.fullmatch(rf"(^|.*\.){name}($|\..*)", path) is not None
    assert Matcher().in_saved_module([name], path) == found


@given(_PATHS.filter(lambda path: "\n" not in path), st.integers(0, 5), st.booleans())
def test_ends_of_paths_match_escaped_or_not(path: str, cut: int, escaped: bool) -> None:
    tail = path.split(".", cut)[-1]
    key = re.escape(tail) if escaped else tail
    assert Matcher().matching_keys(["^" + key, key], path) == [k for k in ("^" + key, key) if peft(k, path)]


@pytest.mark.parametrize(
    "key", ["a*", "a+", "a?", "a|b", "(a)", "[a]", "a{2}", r"\d", r"\b", r"a\Z", "a^b", "a$", r"\1", "é", "a b"]
)
def test_operators_stay_expressions(key: str) -> None:
    assert _Tail.of(rf"(.*\.)?({key})$") is None


@pytest.mark.parametrize("write", [str, re.escape, lambda path: "^" + path], ids=["as it is", "escaped", "anchored"])
def test_a_large_model_with_a_key_for_every_module_is_no_time_problem(write: object) -> None:
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
    paths = [f"model.layers.{index}.{name}" for index in range(120) for name in names]
    keys = [write(path) for path in paths]  # type: ignore[operator]
    matcher = Matcher()
    start = time.thread_time()
    found = [matcher.matching_keys(keys, path) for path in paths]
    assert found == [[key] for key in keys] and not matcher.problems
    assert time.thread_time() - start < 2.0


def test_expressions_keep_their_limit() -> None:
    matcher, path = Matcher(), "a" * 40 + ".b"
    slow = r"((\w|\.|[a-z])+)+\1\1\1\1X?"
    assert matcher.matching_keys([slow, "b"], path) == ["b"] and "takes too long" in matcher.problems[slow]
