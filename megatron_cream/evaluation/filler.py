# SPDX-License-Identifier: Apache-2.0
"""Text that means nothing to a task: sentences and names, made without a corpus."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from megatron_cream.errors import UserError


def _phrases(text: str) -> list[str]:
    return text.replace("\n", " ").strip().split(", ")


_ADJECTIVES = """
amber ancient arctic ashen autumn bitter blazing bold brave breezy bright brisk broad bronze calm
careful cheerful clever cloudy cobalt copper coral cosmic cozy crimson crisp curious dapper daring
dusty eager early earnest easy elder electric emerald empty faint fancy fearless fertile fierce flat
floral fluffy fond foggy formal fragrant free fresh frosty gentle giant glad gleaming golden
graceful grand grassy hasty hazel hidden hollow honest humble icy idle ivory jade jolly keen kind
large lavish lazy lemon lively lofty lonely loud loyal lucky lunar mellow merry mighty misty modest
narrow neat nimble noble northern olive opal orange patient plain polite proud purple quick quiet
rapid rare robust rosy rough royal rustic sandy scarlet serene sharp shy silent silver sleepy slow
smooth snowy soft solar solemn spare spicy steady stormy stout sturdy subtle sunny sweet swift tall
tame tender thirsty tidy timid tiny tranquil upper urban useful vast velvet violet vivid warm wide
wild windy winter wise wooden yellow young zesty
"""
ADJECTIVES = _ADJECTIVES.split()

_NOUNS = """
acorn anchor apple apron arrow badge bakery balloon barrel basket beacon beaver bell bench blanket
boat bottle branch bridge broom bucket button cabin cactus candle canoe canyon carpet castle cedar
cellar chapel cherry chimney circle cliff clock clover coast comet compass cottage cradle crayon
creek cricket crown curtain daisy desert dolphin donkey drum eagle easel engine falcon feather fence
fern ferry field flute forest fountain fox garden gate giraffe glacier glove grape guitar hammer
harbor harp hat hedge heron hill horse island jacket jar kettle kite kitten ladder lake lamp lantern
leaf lemonade letter library lighthouse lion lizard locket maple marble market meadow mill mirror
mitten moose mountain needle nest notebook oak oar orchard otter oven owl paddle paint palace panda
parrot pasture path peach pebble pencil piano pillow pine planet plaza plum pocket pond poppy
pumpkin puzzle quilt rabbit raft ribbon ridge river robin rocket saddle sail salmon school seal
shell ship shovel signal sparrow spoon spring stable star statue stone street summit swan table
temple tent thistle throne ticket tiger tower trail train tulip tunnel turtle valley vase village
violin wagon wall walnut whale wheel willow window zebra
"""
NOUNS = _NOUNS.split()

_PLACES = _phrases("""
near the harbor, behind the old mill, along the river, at the edge of the village, in the library,
under the oak trees, by the railway station, in the market square, on the far side of the lake,
outside the bakery, next to the town hall, above the valley, in a narrow street, at the foot of the
hill, across from the school, in the back of the shop
""")

_DOINGS = _phrases("""
walked slowly home, talked about the weather, repaired a broken chair, waited for the evening train,
counted the passing boats, read the morning paper, carried two heavy baskets, painted the garden
fence, listened to the rain, wrote a long letter, bought bread and cheese, swept the wooden floor,
looked at the distant hills, hummed an old song, fed the ducks, folded the clean sheets
""")

_PEOPLE = _phrases("""
carpenter, teacher, gardener, postman, baker, fisherman, doctor, painter, farmer, librarian,
shepherd, tailor, sailor, musician, clerk, neighbor
""")

_TIMES = _phrases("""
In the morning, After lunch, Late in the afternoon, On Sunday, Before the storm, That winter, Every
now and then, Shortly after noon, During the holidays, On the following day, Early in spring, As on
most days
""")


def sentence(rng: np.random.Generator) -> str:
    """Return one sentence of prose, with the space before it."""
    adjective, person, doing, place, time = (
        choices[rng.integers(len(choices))]
        for choices in (ADJECTIVES, _PEOPLE, _DOINGS, _PLACES, _TIMES)
    )
    return f" {time} the {adjective} {person} {doing} {place}."


@lru_cache(maxsize=32)
def sentences(seed: int, count: int) -> tuple[str, ...]:
    """Return ``count`` sentences; a longer list of the same seed begins with a shorter one."""
    rng = np.random.default_rng([seed, 17])
    return tuple(sentence(rng) for _ in range(count))


def prose(tokens: int, encode: Callable[[str], np.ndarray]) -> str:
    """Return prose of at least ``tokens`` tokens, always the same."""
    count = 1
    while len(encode(text := "".join(sentences(0, count)))) < tokens:
        count *= 2
    return text


MOST_NAMES = len(ADJECTIVES) * len(NOUNS)


def names(rng: np.random.Generator, count: int) -> list[str]:
    """Return different names such as ``amber-lantern``.

    Raises:
        UserError: there are not so many.
    """
    if count > MOST_NAMES:
        raise UserError(
            f"{count} different names are needed: there are {MOST_NAMES}; take a shorter case"
        )
    chosen = rng.permutation(MOST_NAMES)[:count]
    return [f"{ADJECTIVES[i % len(ADJECTIVES)]}-{NOUNS[i // len(ADJECTIVES)]}" for i in chosen]


def spread(count: int) -> list[float]:
    """Return ``count`` places from 0 to 1, both included; the middle for one."""
    return [0.5] if count == 1 else [i / (count - 1) for i in range(count)]
