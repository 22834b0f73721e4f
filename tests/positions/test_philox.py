# SPDX-License-Identifier: Apache-2.0
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cream.positions import philox

word = st.integers(0, 2**64 - 1)


def numpy_words(seed, index, count):
    key = np.array([seed, index], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(count).tolist()


@given(seed=word, index=word, count=st.integers(0, 13))
def test_words_are_those_of_a_fresh_numpy_philox(seed, index, count):
    assert philox.words(seed, index, count) == numpy_words(seed, index, count)


@given(seed=word, index=word)
def test_more_words_begin_with_fewer(seed, index):
    philox.words(seed ^ 1, index, 3)  # leaves a part of a block behind
    assert philox.words(seed, index, 9)[:3] == philox.words(seed, index, 3)


def test_negative_seeds_have_streams_of_their_own():
    assert philox.words(-1, 0, 4) == numpy_words(2**64 - 1, 0, 4)
    assert philox.words(-1, 0, 4) != philox.words(1, 0, 4)


def test_threads_do_not_disturb_each_other():
    wrong = []

    def work(seed):
        for index in range(400):
            if philox.words(seed, index, 4) != expected[seed][index]:
                wrong.append((seed, index))

    expected = [[numpy_words(seed, index, 4) for index in range(400)] for seed in range(4)]
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@given(word=word, bound=st.integers(1, 2**40))
def test_below_stays_below(word, bound):
    assert 0 <= philox.below(word, bound) < bound


@pytest.mark.parametrize("bound", [1, 2, 3, 1000, 2**40])
def test_below_reaches_both_ends(bound):
    assert philox.below(0, bound) == 0
    assert philox.below(2**64 - 1, bound) == bound - 1


def test_below_is_uniform():
    drawn = [philox.below(w, 7) for index in range(5000) for w in philox.words(1, index, 4)]
    counts = np.bincount(drawn, minlength=7)
    assert np.abs(counts - 20_000 / 7).max() < 4 * np.sqrt(20_000 / 7)


@given(word=word)
def test_unit_is_in_zero_one(word):
    assert 0.0 <= philox.unit(word) < 1.0


def test_unit_at_its_ends():
    assert philox.unit(0) == 0.0
    assert philox.unit(2**64 - 1) == 1.0 - 2.0**-53


def test_generator_is_pure_and_its_streams_differ():
    draws = [philox.generator(1, 2, stream).random(8).tolist() for stream in (0, 1, 2)]
    assert draws[0] == philox.generator(1, 2).random(8).tolist()
    assert len({tuple(draw) for draw in draws}) == 3
    assert draws[0] != philox.generator(1, 3).random(8).tolist()


@given(seed=word, index=word, stream=st.integers(0, 9))
def test_generators_are_keyed_by_seed_then_index(seed, index, stream):
    key = np.array([seed, index], dtype=np.uint64)
    counter = np.array([0, 0, 0, stream], dtype=np.uint64)
    wanted = np.random.Generator(np.random.Philox(key=key, counter=counter))
    found = philox.generator(seed, index, stream)
    assert found.integers(2**63, size=5).tolist() == wanted.integers(2**63, size=5).tolist()
