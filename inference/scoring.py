"""What a network makes of a text: its nats, and the figures that follow from them."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.command import InputError


def _nats(model: nn.Module, ids: np.ndarray, skip: int, state, device: str):
    """The summed nats of ids (B, T + 1), of which each row's first `skip` predictions are not
    counted, and the state."""
    rows = torch.from_numpy(ids.astype(np.int64)).to(device)
    logits, state = model(rows[:, :-1], state)
    nats = F.cross_entropy(
        logits[:, skip:].float().flatten(0, 1), rows[:, 1 + skip :].flatten(), reduction="none"
    )
    # an Apple GPU has no fp64
    return (nats.cpu() if nats.device.type == "mps" else nats).double().sum().item(), state


@torch.inference_mode()
def score(
    model: nn.Module,
    tokens: np.ndarray,
    window: int,
    stride: int,
    context: str,
    device: str = "cpu",
) -> float:
    """The negative log-likelihood, in nats, of tokens (n,) but the first. `stride` is of use in
    context "window" only."""
    if len(tokens) < 2:
        raise InputError(f"data: {len(tokens)} tokens; at least 2 are needed to predict one")
    last = len(tokens) - 1
    total = 0.0
    if context == "stream":
        state, length = model.start(1, stream=True), max(16, LOGITS_AT_A_TIME // model.vocab_size)
        for start in range(0, last, length):
            nats, state = _nats(
                model, tokens[None, start : min(start + length, last) + 1], 0, state, device
            )
            total += nats
        return total
    # Whole windows in batches, then a last one that may be shorter; the first has nothing to skip.
    starts = list(range(0, max(last - window, 0) + 1, stride))
    batch = max(1, LOGITS_AT_A_TIME // (model.vocab_size * window))
    total += _nats(model, tokens[None, : min(window, last) + 1], 0, None, device)[0]
    for i in range(1, len(starts), batch):
        rows = np.stack([tokens[start : start + window + 1] for start in starts[i : i + batch]])
        total += _nats(model, rows, window - stride, None, device)[0]
    scored = starts[-1] + window
    if scored < last:
        start = starts[-1] + stride
        total += _nats(model, tokens[None, start:], scored - start, None, device)[0]
    return total


def figures(nats: float, tokens: int, size: int, words: int) -> dict[str, float]:
    """Bits per byte, and perplexity per token and per word. `nats`, `size` (bytes) and `words` are
    those of what is scored, `tokens` is one more: the first token is not."""
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "token_perplexity": _exp(nats / (tokens - 1)),
        "word_perplexity": _exp(nats / max(words, 1)),
    }


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def bigram_nats(train: np.ndarray, tokens: np.ndarray, vocab_size: int) -> float:
    """Mean nats per token of a bigram model of the same tokens: the figure that any language model
    has to beat.

    p(b | a) = (count(a, b) + λ·p(b)) / (count(a) + λ), p(b) add-one smoothed; the λ that suits
    `tokens` best is taken, so the figure errs in the bigram's favour. At most 20 million training
    tokens are counted."""
    train = np.asarray(train[:20_000_000], np.int64)
    tokens = np.asarray(tokens, np.int64)
    pairs, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    wanted = tokens[:-1] * vocab_size + tokens[1:]
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    pair_count = np.where(pairs[place] == wanted, counts[place], 0)
    single = np.bincount(train, minlength=vocab_size)
    p_single = (single[tokens[1:]] + 1) / (len(train) + vocab_size)
    priors = [2.0**i for i in range(-2, 14)]
    return min(
        -np.log((pair_count + k * p_single) / (single[tokens[:-1]] + k)).mean() for k in priors
    )


LOGITS_AT_A_TIME = 2**24  # 64 MB of fp32: bounds memory, and has no bearing on the figures
