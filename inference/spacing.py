"""Undoing WikiText's spaces around punctuation."""

import re

# ===== WikiText's spacing

CONTRACTION = re.compile(r"n't|'(s|t|re|ve|m|ll|d)", re.IGNORECASE)
SPAN_OF_NUMBERS = re.compile(r"\S*\d – \d\S*|\d\d? : \d\d")  # years, scores; times of day
CLOSING = {".", ",", ";", ":", "!", "?", "...", ")", "]", "%"}
OPENING = {"(", "[", "$", "£"}


def clean_spacing(text: str) -> str:
    """Undoes WikiText's tokenisation line by line: `@-@`, `@,@`, `@.@`, spaces around punctuation,
    quotes, brackets and before contractions. Text that is clean stays as it is."""
    return "\n".join(map(_clean_line, text.split("\n")))


def _clean_line(line: str) -> str:
    while (cleaned := _clean_once(line)) != line:  # each pass removes something, so this ends
        line = cleaned
    return line


def _clean_once(line: str) -> str:
    words = line.split(" ")
    glued = set()  # i: no space between words i and i + 1
    is_open = {'"': False, "'": False}
    for i, word in enumerate(words):
        previous, following = words[i - 1] if i else "", words[i + 1] if i + 1 < len(words) else ""
        if word in is_open:
            if (
                not is_open[word]
                and word == "'"
                and (previous.endswith("s") or "'" not in words[i + 1 :])
            ):
                if previous.endswith("s"):  # a plural's genitive, more often than a quote
                    glued.add(i - 1)
                continue
            glued.add(i - 1 if is_open[word] else i)
            is_open[word] = not is_open[word]
        elif word in ("@-@", "@,@", "@.@"):
            words[i] = word[1]
            glued |= {i - 1, i}
        elif SPAN_OF_NUMBERS.fullmatch(f"{previous} {word} {following}"):
            glued |= {i - 1, i}
        elif word in CLOSING or CONTRACTION.fullmatch(word):
            glued.add(i - 1)
        elif word in OPENING:
            glued.add(i)
    return (
        "".join(word if i in glued else word + " " for i, word in enumerate(words[:-1])) + words[-1]
    )
