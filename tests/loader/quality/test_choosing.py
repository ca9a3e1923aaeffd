"""What is kept for a budget: it meets it, nothing of it can be spared, and an estimate is what it says."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8_convert.converter.telling.errors import SettingsError
from fp8_convert.loader.quality.choosing import Budget, Candidate, choose, estimate

DITS = ("transformer", "transformer_2")
candidates = st.lists(
    st.builds(Candidate, st.sampled_from(DITS), st.floats(0, 1, allow_subnormal=False), st.integers(1, 1000)),
    min_size=1,
    max_size=7,
)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("40dB", Budget(decibels=40)),
        (" 32.5 db ", Budget(decibels=32.5)),
        ("200MB", Budget(bytes=200_000_000)),
        ("0dB", Budget(decibels=0)),
        ("1.5GB", Budget(bytes=1_500_000_000)),
    ],
)
def test_budgets(text: str, budget: Budget) -> None:
    assert Budget.read(text) == budget


@pytest.mark.parametrize("text", ["", "40 dBm", "-3dB", "dB", "many", "0MB"])
def test_budgets_that_mean_nothing(text: str) -> None:
    with pytest.raises(SettingsError, match="use decibels, as in 40dB, or bytes, as in 200MB"):
        Budget.read(text)


def test_an_estimate_is_the_measured_error_times_what_is_left() -> None:
    four = [Candidate(DITS[0], 1e-4, 1), Candidate(DITS[0], 3e-4, 1), Candidate(DITS[1], 5e-4, 1)]
    plain = {DITS[0]: 8e-4, DITS[1]: 2e-4}
    assert estimate(four, [], plain) == plain
    assert estimate(four, [1], plain) == {DITS[0]: pytest.approx(2e-4), DITS[1]: 2e-4}
    assert estimate(four, [0, 1, 2], plain) == {DITS[0]: 0, DITS[1]: 0}


@given(candidates, st.floats(0, 60))
def test_decibels_are_met_and_nothing_can_be_spared(given_: list[Candidate], decibels: float) -> None:
    plain = {c: 2 * sum(x.error for x in given_ if x.component == c) for c in DITS}
    budget = Budget(decibels=decibels)
    kept = choose(given_, plain, budget)
    assert all(error <= budget.error + 1e-12 for error in estimate(given_, kept, plain).values())
    for index in kept:
        without = estimate(given_, [i for i in kept if i != index], plain)
        assert without[given_[index].component] > budget.error


@given(candidates, st.integers(1, 3000))
def test_bytes_are_kept_to_and_the_worthiest_that_fits_is_kept(given_: list[Candidate], most: int) -> None:
    plain = {c: sum(x.error for x in given_ if x.component == c) for c in DITS}
    kept = choose(given_, plain, Budget(bytes=most))
    cost = sum(given_[i].cost for i in kept)
    assert cost <= most
    left_out = [i for i, x in enumerate(given_) if i not in kept and x.error > 0]
    assert all(given_[i].cost > most - cost for i in left_out), "nothing else would fit"


def test_it_is_near_the_smallest_set_there_is() -> None:
    given_ = [Candidate(DITS[0], e, c) for e, c in [(9, 90), (5, 20), (4, 30), (2, 5), (1, 40), (0.5, 1)]]
    plain, budget = {DITS[0]: 21.5}, Budget(decibels=-10 * math.log10(8))
    kept = choose(given_, plain, budget)
    sets = itertools.chain.from_iterable(itertools.combinations(range(6), n) for n in range(7))
    enough = [one for one in sets if estimate(given_, one, plain)[DITS[0]] <= budget.error]
    assert sum(given_[i].cost for i in kept) <= 1.2 * min(sum(given_[i].cost for i in one) for one in enough)


def test_what_is_fixed_stays() -> None:
    given_ = [Candidate(DITS[0], 9, 1, fixed=True), Candidate(DITS[0], 1, 1)]
    assert choose(given_, {DITS[0]: 10}, Budget(decibels=60)) == [1]
    assert choose(given_, {DITS[0]: 10}, Budget(bytes=10)) == [1]
