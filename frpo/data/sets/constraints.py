"""Generate prompts that ask to write about a topic and to follow one constraint.

No held-out topic is a training topic. This module does not judge answers; `frpo.rewards.constraints` does.
"""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np

MOST_WORDS = 12
OPENING, CLOSING = "Certainly", "That is all."

INSTRUCTIONS: Mapping[str, str] = {
    "no_commas": "Use no commas.", "few_words": f"Use at most {MOST_WORDS} words.",
    "two_bullets": "Write exactly two bullet points.", "opening": f"Begin with the word {OPENING}.",
    "closing": f'End with "{CLOSING}"', "quoted": "Write it as a quotation in quotation marks."}
"""Name of a constraint -> the sentence in a prompt."""

_TRAINING = """
    acorns airports ants apples arrows autumn balloons bamboo bananas bands baskets beans bears bees bells bicycles
    birds boats bones books boots bottles bread bricks bridges brooms butter buttons cabbage camels cameras candles
    canoes carpets carrots castles caves chairs chalk cheese chess chimneys circles clay clocks clouds clowns coal
    coats coffee coins copper corn cotton cows crabs crowns dancing deserts diamonds dogs dolphins donkeys doors
    dragons drums ducks eagles earrings elephants engines farming feathers fences fire fish flags flour flutes
    football forests forks fountains frogs furniture games garlic ghosts giraffes glaciers glass gloves goats gold
    grapes grass guitars hammers hats hills honey horses ice insects iron islands jam jazz jewels kettles kites
    ladders lakes lamps leather lemons letters lettuce lightning lions magnets maps marble masks milk mirrors money
    monkeys moss mountains museums mushrooms music nails needles nests newspapers oceans olives onions oranges owls
    paint palaces paper parrots pearls peas pencils pepper pianos pigs pillows pirates planets plums poems ponds
    pumpkins puppets rabbits radios rain rice rings robots rockets roofs ropes roses salt sand scarecrows
"""

_HELDOUT = """
    schools scissors seeds shadows sharks sheep ships shoes silk silver singing skating snails snow soap soup
    spiders spoons squirrels stamps stars statues storms sugar sunflowers swans swimming tea telephones tents
    theatres tigers towers toys trains trees tulips tunnels turnips turtles umbrellas valleys vegetables violins
    waterfalls whales windmills winter
"""

TRAINING_TOPICS, HELDOUT_TOPICS = tuple(_TRAINING.split()), tuple(_HELDOUT.split())
"""Topics: plain nouns. Each plural is the singular with an s, so that a verifier finds both."""


def training_rows(limit: int | None, seed: int) -> list[dict[str, str]]:
    """Return rows of every training topic with every constraint, in seeded order, or the first `limit` rows."""
    rows = [_row(topic, constraint) for topic in TRAINING_TOPICS for constraint in INSTRUCTIONS]
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(rows))
    return [rows[i] for i in order[:limit]]


def heldout_rows(limit: int | None, seed: int) -> list[dict[str, str]]:
    """Return one row for every held-out topic, with the constraints in turn, or the first `limit` rows.

    The rows do not depend on `seed`.
    """
    names = list(INSTRUCTIONS)
    return [_row(topic, names[number % len(names)]) for number, topic in enumerate(HELDOUT_TOPICS)][:limit]


def _row(topic: str, constraint: str) -> dict[str, str]:
    prompt = f"Write one or two sentences about {topic}. {INSTRUCTIONS[constraint]}"
    return {"prompt": prompt, "topic": topic, "constraint": constraint}
