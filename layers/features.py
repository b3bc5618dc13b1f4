"""What a token's text looks like, as named features: a fixed basis beside the embedding that is
learned (key token_features).

Words that begin with the same letters or end in the same suffix share these features, so what is
learned of one token is known of others that look like it, rare ones too."""

import math
import string

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data.tokenizer import Tokenizer

LETTERS = string.ascii_lowercase
SUFFIXES = (
    "s",
    "ed",
    "ing",
    "ly",
    "er",
    "est",
    "ion",
    "al",
    "ous",
    "ful",
    "ness",
    "ment",
    "ive",
    "able",
    "'s",
    "n't",
)
KINDS = {  # of the text, and of the word that it is without the space around it
    "begins with a space": lambda text, word: text.startswith(" "),
    "has a line end": lambda text, word: "\n" in text,
    "is space alone": lambda text, word: not word,
    "begins with a capital": lambda text, word: word[:1].isupper(),
    "is all capitals": lambda text, word: len(word) > 1 and word.isupper(),
    "is letters": lambda text, word: word.isalpha(),
    "is digits": lambda text, word: word.isdecimal(),
    "has no letter or digit": lambda text, word: bool(word) and not any(c.isalnum() for c in word),
    "is not ASCII": lambda text, word: not text.isascii(),
    **{f"is {n} long": lambda text, word, n=n: len(word) == n for n in range(1, 6)},
    "is longer than 5": lambda text, word: len(word) > 5,
}
NAMES = (
    *KINDS,
    *(f"first letter {c}" for c in LETTERS),
    *(f"last letter {c}" for c in LETTERS),
    *(f"has letter {c}" for c in LETTERS),
    *(f"ends in {suffix}" for suffix in SUFFIXES),
)


def features_of(text: str) -> list[float]:
    """Whether `text` has each feature of `NAMES`, 1.0 or 0.0."""
    word = text.strip()
    lower = word.lower()
    return [
        *(float(has(text, word)) for has in KINDS.values()),
        *(float(lower.startswith(c)) for c in LETTERS),
        *(float(lower.endswith(c)) for c in LETTERS),
        *(float(c in lower) for c in LETTERS),
        *(float(len(lower) > len(suffix) and lower.endswith(suffix)) for suffix in SUFFIXES),
    ]


def token_features(tokenizer: Tokenizer) -> Tensor:
    """The features of every token, (V, len(NAMES)): a row's are all as large, and their squares add
    up to 1."""
    rows = torch.tensor(
        [features_of(tokenizer.decode([token])) for token in range(tokenizer.vocab_size)]
    )
    return F.normalize(rows)


class FeatureEmbedding(nn.Embedding):
    """An embedding to which the tokens' features are added by a linear map, zero at first: E[ids] +
    B[ids] M.

    The basis B is a part of the checkpoint. It is not a number until `fill_features` gives it a
    tokenizer's."""

    def __init__(self, vocab_size: int, width: int):
        super().__init__(vocab_size, width)
        self.register_buffer("basis", torch.full((vocab_size, len(NAMES)), math.nan))
        self.feature_map = nn.Parameter(torch.zeros(len(NAMES), width))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + F.embedding(ids, self.basis) @ self.feature_map

    def whole(self) -> Tensor:
        """The embedding of every token, (V, C)."""
        return self.weight + self.basis @ self.feature_map


def fill_features(model: nn.Module, tokenizer: Tokenizer) -> None:
    """Gives each embedding of `model` that has a basis the features of the tokenizer's tokens."""
    embeddings = [module for module in model.modules() if isinstance(module, FeatureEmbedding)]
    basis = token_features(tokenizer) if embeddings else None
    for embedding in embeddings:
        embedding.basis.copy_(basis)
