"""Where a generated text ends before its number of tokens: at the tokenizer's end of text, or at a
text that the user names."""

from collections.abc import Sequence

from torch import Tensor

from data.tokenizer import TextStream, Tokenizer


class Ending:
    """The text of tokens that come one at a time, up to where it ends: neither an end of text nor
    any of `stops` is in it.

    `ended` says whether one has come, `count` how many tokens were taken: with those of what ended
    the text, and none after it."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.stops = stops
        self.stream = TextStream(tokenizer)
        self.held = ""  # what may be the beginning of a stop
        self.ended = False
        self.count = 0

    def push(self, token: int) -> str:
        """The text that is certain to be the text's own by now: maybe none."""
        if self.ended:
            return ""
        self.count += 1
        if token == self.tokenizer.end_of_text:
            text = self.flush()
            self.ended = True
            return text
        text = self.held + self.stream.push(token)
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            self.held = ""
            self.ended = True
            return text[: min(places)]
        size = max((_begun(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - size :]
        return text[: len(text) - size]

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        if self.ended:
            return ""
        text = self.held + self.stream.flush()
        self.held = ""
        return text


def _begun(text: str, stop: str) -> int:
    """The characters at the end of `text` that may be the beginning of `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


def ended_text(tokens: Sequence[int], tokenizer: Tokenizer, stops: Sequence[str] = ()) -> str:
    """The text of `tokens` up to where it ends."""
    ending = Ending(tokenizer, stops)
    return "".join([ending.push(token) for token in tokens]) + ending.flush()


class Endings:
    """An `Ending` for each of several texts, for `sampling.generate`."""

    def __init__(self, tokenizer: Tokenizer, rows: int, stops: Sequence[str] = ()):
        self.texts = [Ending(tokenizer, stops) for _ in range(rows)]

    def add(self, tokens: Tensor) -> bool:
        """Takes each text's next token (rows,); returns whether all texts have ended."""
        for text, token in zip(self.texts, tokens.tolist(), strict=True):
            text.push(token)
        return all(text.ended for text in self.texts)

    @property
    def counts(self) -> list[int]:
        """The tokens of each text up to where it ends."""
        return [text.count for text in self.texts]
