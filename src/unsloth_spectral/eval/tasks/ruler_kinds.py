"""Synthetic tasks after RULER (Hsieh et al. 2024, https://arxiv.org/abs/2404.06654), written from its description.

Each function draws one problem from a generator: sentences to hide in real text, or a list of words that is the whole
context, then a question and the strings that a right answer contains.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from unsloth_spectral.eval.tasks.haystack import CITIES, made_up_words, numbers


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem.

    Attributes:
        sentences: to hide in real text, or, where ``is_text`` is false, words that follow each other as the context.
        question: the question.
        answer: the given beginning of the answer.
        wanted: the strings that a right answer contains.
        is_text: whether ``sentences`` are hidden in text.
    """

    sentences: tuple[str, ...]
    question: str
    answer: str
    wanted: tuple[str, ...]
    is_text: bool = True


def multi_value(generator: random.Random, room: int) -> Problem:
    """Four numbers of one key among those of other keys; all four are asked for (section 3, multi-values)."""
    key, *others = generator.sample(CITIES, 3)
    values = numbers(8, generator, digits=4)
    pairs = [(key, value) for value in values[:4]] + [
        (others[index % 2], value) for index, value in enumerate(values[4:])
    ]
    generator.shuffle(pairs)
    return Problem(
        tuple(_number_of(name, value) for name, value in pairs),
        f"What are the four magic numbers of {key} in the text above?",
        f"The magic number of {key}: {key}",
        tuple(values[:4]),
    )


def multi_query(generator: random.Random, room: int) -> Problem:
    """Eight keys with a number each, four of which are asked for at once (section 3, multi-queries)."""
    keys, values = generator.sample(CITIES, 8), numbers(8, generator, digits=4)
    pairs = list(zip(keys, values, strict=True))
    chosen = generator.sample(pairs, 4)
    names = ", ".join(key for key, _ in chosen[:-1]) + f" and {chosen[-1][0]}"
    return Problem(
        tuple(_number_of(key, value) for key, value in pairs),
        f"What are the magic numbers of {names} in the text above?",
        f"The magic number of {chosen[0][0]}: {chosen[0][0]}",
        tuple(value for _, value in chosen),
    )


def variable_tracking(generator: random.Random, room: int) -> Problem:
    """Two chains of four assignments behind a number each; all names of the first chain are asked for."""
    names = [name.upper() for name in made_up_words(10, generator)]
    first, second = numbers(2, generator, digits=5)
    chains = (_chain(names[:5], first), _chain(names[5:], second))
    # Each chain stays in order; a draw decides which of the two comes next.
    order = [0] * 5 + [1] * 5
    generator.shuffle(order)
    steps = [iter(chain) for chain in chains]
    return Problem(
        tuple(next(steps[index]) for index in order),
        f"Find all variables that are assigned the value {first} in the text above.",
        f"The variables that are assigned the value {first}: VAR",
        tuple(names[:5]),
    )


def common_words(generator: random.Random, room: int) -> Problem:
    """A numbered list in which ten words come ten times or more and all others once; the ten are asked for."""
    # A word of the list takes about 8 tokens with its number; rounds of 10 common words x 10 and 20 others x 1.
    rounds = max(1, room // (8 * 120))
    common = made_up_words(10, generator)
    rare = [word for word in made_up_words(10 + 20 * rounds, generator) if word not in common][: 20 * rounds]
    words = common * (10 * rounds) + rare
    generator.shuffle(words)
    return Problem(
        tuple(f"{index + 1}. {word}" for index, word in enumerate(words)),
        "What are the 10 most common words in the list above?",
        "The 10 most common words in the list above are:",
        tuple(common),
        is_text=False,
    )


def frequent_words(generator: random.Random, room: int) -> Problem:
    """A text of made-up words, the k-th as often as 1 / k^2 (Zipf, exponent 2); the three most frequent are wanted."""
    words = made_up_words(50, generator)
    total = max(60, room // 5)  # a made-up word takes about 4 tokens, and a space
    weights = [(rank + 1) ** -2.0 for rank in range(len(words))]
    counts = [max(1, round(total * weight / sum(weights))) for weight in weights]
    text = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    generator.shuffle(text)
    return Problem(
        tuple(text),
        "What are the three most frequent words in the coded text above?",
        "The three most frequent words in the coded text above are:",
        tuple(words[:3]),
        is_text=False,
    )


KINDS: dict[str, Callable[[random.Random, int], Problem]] = {
    "multi-value": multi_value,
    "multi-query": multi_query,
    "variable-tracking": variable_tracking,
    "common-words": common_words,
    "frequent-words": frequent_words,
}


def _number_of(key: str, value: str) -> str:
    return f"The magic number of {key}: {key} {value}."


def _chain(names: list[str], value: str) -> list[str]:
    links = zip(names[1:], names, strict=False)
    return [f"VAR {names[0]} = {value}", *(f"VAR {name} = VAR {before}" for name, before in links)]
