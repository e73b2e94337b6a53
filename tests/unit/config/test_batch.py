import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.config import BatchSizes, check_batch, check_batches
from megagpt.config.batch import join_choices, nearest_divisors
from megagpt.errors import ConfigError


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_micro_batch_times_accumulation_times_ranks_is_the_global_batch(micro, accumulation, world_size):
    assert check_batch(micro * accumulation * world_size, micro, world_size) == (micro, accumulation)


@given(st.integers(1, 256), st.integers(1, 64))
def test_without_a_micro_batch_size_a_rank_takes_its_whole_share_at_once(share, world_size):
    assert check_batch(share * world_size, None, world_size) == (share, 1)


def test_a_world_size_that_leaves_a_rest_is_an_error_with_the_world_sizes_that_do_not():
    with pytest.raises(ConfigError) as caught:
        check_batch(32, None, 5)
    assert str(caught.value) == (
        "train.global_batch_size: 32 sequences cannot be divided among 5 ranks; start 1, 2, 4, 8, 16 or 32 ranks, "
        "or choose a multiple of 5 as global batch size"
    )


def test_a_micro_batch_that_leaves_a_rest_is_an_error_with_the_sizes_that_do_not():
    with pytest.raises(ConfigError) as caught:
        check_batch(32, 3, 2)
    assert str(caught.value) == (
        "train.micro_batch_size: 3 does not divide a rank's share of 16 sequences (32 among 2 ranks); "
        "choose 1, 2, 4, 8 or 16"
    )


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 9))
def test_the_offered_divisors_are_the_nearest_ones(number, wanted, count):
    offered = nearest_divisors(number, wanted, count)
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    assert offered == sorted(set(offered) & set(divisors))
    assert len(offered) == min(count, len(divisors))
    left_out = [abs(d - wanted) for d in divisors if d not in offered]
    assert not left_out or max(abs(d - wanted) for d in offered) <= min(left_out)


def test_choices_are_joined_as_english():
    assert [join_choices(c) for c in ([1], [1, 2], ["a", "b", "c"])] == ["1", "1 or 2", "a, b or c"]


@given(
    final=st.integers(1, 12), stages=st.integers(1, 5), unit=st.integers(1, 4), samples=st.integers(1, 300),
    steps=st.integers(0, 200),
)  # fmt: skip
def test_ramp_up_is_counted_like_one_step_after_the_other(final, stages, unit, samples, steps):
    batches = BatchSizes((stages + final) * unit, final * unit, unit, samples)
    consumed = 0
    for step in range(steps):
        assert batches.steps_for(consumed) == step
        size = batches.at(consumed)
        assert size in batches.sizes()
        assert (size == batches.final) == (consumed >= samples)
        consumed += size
    assert batches.after_steps(steps) == consumed


def test_ramp_up_has_equally_long_stages():
    batches = BatchSizes(final=32, start=8, increment=8, samples=300)
    assert [batches.at(consumed) for consumed in (0, 99, 100, 199, 200, 299, 300, 10**9)] == [
        8,
        8,
        16,
        16,
        24,
        24,
        32,
        32,
    ]


def test_every_size_of_a_ramp_up_must_divide_and_the_micro_batch_fits_all():
    batches = BatchSizes(final=32, start=8, increment=8, samples=300)
    assert check_batches(batches, None, 2) == (4, 4)
    assert check_batches(batches, 2, 4) == (2, 4)
    assert check_batches(BatchSizes(32), None, 4) == (8, 1)
    with pytest.raises(ConfigError, match=r"a step of the ramp-up has 8 sequences.*choose multiples of 16"):
        check_batches(batches, 4, 4)
