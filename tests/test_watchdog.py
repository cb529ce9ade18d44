"""The watchdog's judgement, from positions as ranks write them."""

import pytest

from bigtrain.supervision.watchdog import Diagnosis, RankPosition, diagnose, stragglers


def position(posts: int, heartbeats: int, phase: str = "forward") -> RankPosition:
    return RankPosition(posts=posts, step=9, phase=phase, heartbeats=heartbeats)


def test_a_silent_rank_is_named() -> None:
    """Rank 1 has written nothing new; it is not called behind as well."""
    before = [position(5, 40), position(5, 38)]
    after = [position(8, 40), position(5, 38)]
    assert diagnose(before, after) == Diagnosis([1], [], ["step 9: forward", "step 9: forward"])


def test_a_rank_that_writes_but_is_not_as_far_is_behind() -> None:
    before = [position(5, 40, "meeting"), position(5, 38), position(5, 40, "meeting")]
    after = [position(8, 40, "meeting"), position(8, 38), position(8, 40, "meeting")]
    found = diagnose(before, after)
    assert (found.silent, found.behind) == ([], [1])
    assert found.places == ["step 9: meeting", "step 9: forward", "step 9: meeting"]


def test_the_furthest_of_the_ranks_that_write_is_the_measure() -> None:
    """A silent rank may have been further than all others."""
    before = [position(5, 99), position(5, 40), position(5, 38)]
    after = [position(5, 99), position(8, 40), position(8, 38)]
    found = diagnose(before, after)
    assert (found.silent, found.behind) == ([0], [2])


def test_all_in_one_place_are_neither_silent_nor_behind() -> None:
    found = diagnose([position(1, 7)] * 3, [position(2, 7)] * 3)
    assert (found.silent, found.behind) == ([], [])


def test_a_rank_that_has_never_written_is_silent_and_has_no_place() -> None:
    found = diagnose([position(5, 40), RankPosition()], [position(8, 40), RankPosition()])
    assert (found.silent, found.behind) == ([1], [])
    assert found.places == ["step 9: forward", ""]


def test_a_rank_that_writes_for_the_first_time_is_not_silent() -> None:
    found = diagnose([position(5, 40), RankPosition()], [position(8, 40), position(1, 2)])
    assert (found.silent, found.behind) == ([], [1])


def test_nobody_is_named_where_the_store_never_answered() -> None:
    assert diagnose([], []) == Diagnosis([], [], [])
    assert diagnose([], [position(8, 40)]) == Diagnosis([], [], [])


def test_without_a_second_look_nobody_is_silent() -> None:
    """Rank 0, which serves the store, may have left before the second look."""
    found = diagnose([position(5, 40), position(5, 38)], [])
    assert (found.silent, found.behind) == ([], [1])
    assert found.places == ["step 9: forward", "step 9: forward"]


@pytest.mark.parametrize(
    ("busy", "slow"),
    [
        ([0.1, 0.1, 0.1], set()),
        ([0.1, 0.1, 0.16], {2}),
        ([0.1, 0.1, 0.14], set()),
        ([0.1, 0.3], {1}),  # of two ranks the faster one is the measure
        ([0.0001, 0.0001, 0.001], set()),  # less than a millisecond more
    ],
)
def test_a_straggler_needs_half_as_much_again_as_the_median(
    busy: list[float], slow: set[int]
) -> None:
    assert stragglers(busy) == slow
