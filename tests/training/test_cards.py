"""The descriptions of graphics cards."""

import pytest

from vit_jax.training.cards import CARDS, card


@pytest.mark.parametrize("name", CARDS)
def test_cards_are_described_whole(name):
    text = card(name).proto()
    assert text.count("{") == text.count("}") == 4 and f"core_count: {CARDS[name].cores}\n" in text
    assert 1 < CARDS[name].bfloat16 / CARDS[name].float32 < 32 and CARDS[name].memory > 20e9
