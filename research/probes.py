"""What a network can do with its context, as numbers.

    python -m research.probes --checkpoint logs/RUN           # a trained model, on its test split

- Loss by position: nats per token by the place in the window. A model that uses its context gets
  better along it.
- Lift of a repeated passage: nats per token of a passage after another one, less those after the
  same one.
- Needle by distance: a key of random tokens and its value stand in a text, and after d tokens the
  key again. The lift of the value over a text that holds another value there, and how often the
  value is the most probable token.
"""

import itertools
import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import DATA_HELP, add_checkpoint_options, load_asked, say_on_stderr
from common.command import InputError, Parser, run_command
from data.prepare import read_tokens

# A needle: three tokens of a vocabulary of thousands are a key that no text has by chance.
KEY = 3
VALUE = 1  # token
BATCH = 16  # windows that are read at a time, which bounds the memory of their logits


@torch.inference_mode()
def token_nats(model: nn.Module, ids: Tensor) -> Tensor:
    """(N, T) → nats (N, T − 1) of each token but the first, each row a text of its own."""
    parts = []
    for rows in ids.split(BATCH):
        logits, _ = model(rows[:, :-1])
        parts.append(F.cross_entropy(logits.float().mT, rows[:, 1:], reduction="none"))
    return torch.cat(parts)


def windows_of(tokens: np.ndarray, length: int, limit: int) -> Tensor:
    """The first windows of `length` tokens, side by side, at most `limit`: (N, length) int64."""
    count = min(limit, len(tokens) // length)
    if count < 1:
        raise InputError(f"data: {len(tokens)} tokens, but a probe needs {length}; give more text")
    return torch.from_numpy(tokens[: count * length].astype(np.int64)).view(count, length)


def loss_by_position(
    model: nn.Module, tokens: np.ndarray, block_size: int, limit: int
) -> dict[str, float]:
    """Mean nats of the tokens at positions 1, 2–3, 4–7, … of a window, by the range's name."""
    windows = windows_of(tokens, block_size, limit)
    nats = token_nats(model, windows).double().mean(0)  # (block_size − 1,)
    edges = [2**i for i in range(int(math.log2(block_size - 1)) + 1)] + [block_size]
    return {
        f"{low}-{high - 1}": nats[low - 1 : high - 1].mean().item()
        for low, high in itertools.pairwise(edges)
    }


def repetition_lift(
    model: nn.Module, tokens: np.ndarray, block_size: int, limit: int
) -> dict[str, float]:
    """Passages of an eighth, a quarter and half of a window: nats per token after another passage
    less after itself, of all but the first token. 0 = nothing remembered."""
    lifts = {}
    for length in (block_size // 8, block_size // 4, block_size // 2):
        passages = windows_of(tokens, length, limit)
        others = passages.roll(len(passages) // 2, dims=0)
        after = [
            token_nats(model, torch.cat([first, passages], 1))[:, length:]
            for first in (others, passages)
        ]
        lifts[str(length)] = (after[0] - after[1]).double().mean().item()
    return lifts


def needle_by_distance(
    model: nn.Module, tokens: np.ndarray, block_size: int, limit: int, seed: int = 0
) -> dict[str, dict]:
    """By distance (tokens from the value to the question): lift in nats of the value, share of
    values ranked first, and median rank."""
    text = windows_of(tokens, block_size, limit)
    generator = torch.Generator().manual_seed(seed)
    length = KEY + VALUE
    key, value, other = (  # (N, KEY), (N, VALUE), (N, VALUE)
        torch.randint(model.vocab_size, (len(text), n), generator=generator)
        for n in (KEY, VALUE, VALUE)
    )
    results = {}
    distance = 4
    while distance + 2 * length <= block_size:
        question = text.clone()
        question[:, -length:] = torch.cat([key, value], 1)
        at = block_size - 2 * length - distance
        nats = {}
        logits = None
        for name, told in (("told", value), ("misled", other)):
            ids = question.clone()
            ids[:, at : at + length] = torch.cat([key, told], 1)
            nats[name] = token_nats(model, ids)[:, -VALUE:].double().mean().item()
            if name == "told":
                logits = torch.cat(
                    [last_logits(model, rows) for rows in ids[:, :-VALUE].split(BATCH)]
                )
        rank = (logits > logits.gather(1, value)).sum(1)
        results[str(distance)] = {
            "lift": nats["misled"] - nats["told"], "first": (rank == 0).double().mean().item(),
            "median_rank": int(rank.median()),
        }  # fmt: skip
        distance *= 2
    return results


@torch.inference_mode()
def last_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """ids (N, T) → the logits after the last token, (N, V) in fp32."""
    return model(ids)[0][:, -1].float()


def main() -> None:
    parser = Parser(__doc__.split("\n", 1)[0])
    add_checkpoint_options(parser)
    parser.add_argument("--data", default="test", help=DATA_HELP)
    parser.add_argument(
        "--windows", type=int, default=256, help="windows of each probe at the most (default 256)"
    )
    args = parser.parse_args()
    if args.windows < 2:
        raise InputError("windows must be at least 2")
    model, config, tokenizer, folder, _ = load_asked(args.checkpoint, args.tokenizer)
    text = read_tokens(args.data, config, tokenizer, say_on_stderr, folder)
    probes = {
        "nats_by_position": loss_by_position, "repetition_lift_nats": repetition_lift,
        "needle_by_distance": needle_by_distance,
    }  # fmt: skip
    result: dict = {
        name: probe(model.eval(), text.tokens, config.block_size, args.windows)
        for name, probe in probes.items()
    }
    result |= {
        "data": args.data,
        "text": text.source,
        "text_of_the_run": text.of_run,
        "tokenizer": tokenizer.name,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    run_command(main)
