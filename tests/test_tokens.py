"""Guesses of length: they learn, they never fail, and no single input spoils them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from adapter_router.routing.tokens import TokenEstimate


@pytest.mark.parametrize(
    ("inputs", "tokens"),
    [
        ("", 2),
        ("x" * 400, 102),
        ("ж" * 200, 102),
        (("x" * 200, "x" * 200), 102),
        (b"\x89PNG", 200),
        ({"pixel_values": np.zeros((3, 8, 8))}, 200),
        ({"attention_mask": np.ones(7), "input_ids": np.ones(7)}, 7),
        ({"inputs_embeds": np.ones((5, 16))}, 5),
    ],
)
def test_the_first_guess(inputs: Any, tokens: int) -> None:
    assert TokenEstimate().of(inputs) == tokens


@pytest.mark.parametrize(
    "inputs", [{}, {"input_ids": 3}, {"input_ids": np.array(3)}, {"input_ids": []}, "\ud800", (1, 2)]
)
def test_nonsense_is_at_least_one_token(inputs: Any) -> None:
    estimate = TokenEstimate()
    assert estimate.of(inputs) >= 1
    estimate.learn(inputs, 5)
    assert estimate.of(inputs) >= 1


def test_bytes_a_token_are_learned_from_texts_and_pairs() -> None:
    estimate = TokenEstimate()
    for _ in range(300):
        estimate.learn("x" * 200, 102)
        estimate.learn(("x" * 100, "x" * 100), 102)
    assert estimate.of("x" * 1000) == pytest.approx(502, abs=5)
    assert estimate.of(b"image") == 200


def test_the_size_of_images_is_learned() -> None:
    estimate = TokenEstimate()
    for _ in range(600):
        estimate.learn(b"image", 17)
    assert estimate.of({"pixel_values": np.zeros((3, 8, 8))}) == 17
    assert estimate.of("x" * 400) == 102


def test_a_text_that_was_cut_changes_little() -> None:
    estimate = TokenEstimate(max_tokens=512)
    for _ in range(100):
        estimate.learn("x" * 400, 102)
    estimate.learn("x" * 1_000_000, 512)
    assert estimate.of("x" * 400) == pytest.approx(102, abs=5)
    assert estimate.of("x" * 1_000_000) == 512
