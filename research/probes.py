"""What a network can do with its context, as numbers.

    python -m research.probes --checkpoint logs/RUN           # a trained model, on its test split
    python -m research.probes --mqar --config FILE --lr 0.001 --steps 100   # associative recall

- Loss by position: nats per token by the place in the window. A model that uses its context gets
  better along it.
- Lift of a repeated passage: nats per token of a passage after another one, less those after the
  same one.
- Needle by distance: a key of random tokens and its value stand in a text, and after d tokens the
  key again. The lift of the value over a text that holds another value there, and how often the
  value is the most probable token.
- Multi-query associative recall (after Arora et al., "Zoology", 2023): pairs of key and value, then
  keys in another order between filler, each to be answered by its value. Accuracy on sequences that
  were never seen; chance is 1 in 128.
"""

import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import DATA_HELP, add_checkpoint_options, load_asked, say_on_stderr
from common.command import InputError, Parser, run_command
from config import Config, load_config, make_config
from data.prepare import read_tokens
from model import build_model
from training.optimizers import learning_rate, make_optimizers, rates, step_at_rate

# A needle: three tokens of a vocabulary of thousands are a key that no text has by chance.
KEY = 3
VALUE = 1  # token
BATCH = 16  # windows that are read at a time, which bounds the memory of their logits

# Associative recall: a sequence of 128 tokens begins with 8 pairs of key and value. Id 0 is the
# filler, 1 to 128 are keys, 129 to 256 values.
PAIRS = 8
LENGTH = 128
KEYS = 128
VALUES = 128
FILLER = 0
MQAR_VOCABULARY = 1 + KEYS + VALUES
HELD_OUT = 2**40  # seeds from here on are of the test, those before of training


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


# ===== Multi-query associative recall


def recall_batch(
    rows: int, seed: int, pairs: int = PAIRS, length: int = LENGTH
) -> tuple[Tensor, Tensor]:
    """(ids, answers), both (rows, length) int64: answers are the value where a key is asked for,
    else −100 (not scored)."""
    generator = torch.Generator().manual_seed(seed)

    def distinct(high: int, count: int) -> Tensor:
        """(rows, count) numbers below `high`, in random order, none twice in a row."""
        return torch.rand(rows, high, generator=generator).argsort(1)[:, :count]

    keys = 1 + distinct(KEYS, pairs)
    values = 1 + KEYS + torch.randint(VALUES, (rows, pairs), generator=generator)
    ids = torch.full((rows, length), FILLER)
    answers = torch.full((rows, length), -100)
    ids[:, 0 : 2 * pairs : 2] = keys
    ids[:, 1 : 2 * pairs : 2] = values
    places = 2 * pairs + distinct(length - 2 * pairs, pairs)  # where keys are asked for
    ids.scatter_(1, places, keys)
    answers.scatter_(1, places, values)
    return ids, answers


def train_recall(
    config: Config, steps: int, batch: int = 64, rows: int = 256, say=print
) -> dict[str, float]:
    """Trains a network of `config` on the task, by its seed; returns the accuracy on `rows` unseen
    sequences."""
    torch.manual_seed(config.seed)
    model = build_model(config, MQAR_VOCABULARY)
    optimizers = make_optimizers(model, config)
    began = time.process_time()
    for step in range(steps):
        ids, answers = recall_batch(batch, config.seed * 2**20 + step)
        loss = F.cross_entropy(model(ids)[0].flatten(0, 1), answers.flatten())
        loss.backward()
        step_at_rate(model, optimizers, learning_rate(step, steps, config), config.grad_clip)
        if (step + 1) % max(1, steps // 10) == 0:
            say(
                f"step {step + 1}/{steps}  loss {loss.item():.4f}  accuracy"
                f" {recall_accuracy(model, rows):.4f}"
            )
    return {
        "mqar_accuracy": recall_accuracy(model, rows),
        "mqar_steps": steps,
        "mqar_cpu_seconds": time.process_time() - began,
    }


@torch.inference_mode()
def recall_accuracy(model: nn.Module, rows: int) -> float:
    """The share of right answers on so many sequences that training has not seen."""
    was_training = model.training
    ids, answers = recall_batch(rows, HELD_OUT)
    guesses = torch.cat([model.eval()(part)[0].argmax(-1) for part in ids.split(64)])
    model.train(was_training)
    return (guesses == answers)[answers >= 0].double().mean().item()


def recall_config(path: Path, lr: float | None = None, seed: int | None = None) -> Config:
    """The config for the task: windows of its length, no dropout; with another learning rate or
    seed."""
    config = load_config(path)
    if config.token_features:
        raise InputError(f"{path}: token_features: the task's tokens have no text; set it to false")
    places = ("embedding", "projection", "mixer", "mlp", "lm_head")
    changes = {"block_size": LENGTH} | {f"dropout_{place}": 0.0 for place in places}
    if lr is not None:
        changes |= rates(config, lr)
    if seed is not None:
        changes |= {"seed": seed}
    return make_config(config.model_dump() | changes, str(path))


def main() -> None:
    parser = Parser(__doc__.split("\n", 1)[0])
    add_checkpoint_options(parser, required=False)
    parser.add_argument("--data", default="test", help=DATA_HELP)
    parser.add_argument(
        "--windows", type=int, default=256, help="windows of each probe at the most (default 256)"
    )
    parser.add_argument(
        "--mqar", action="store_true", help="train a config on multi-query associative recall"
    )
    parser.add_argument(
        "--config", default="config.json", metavar="FILE", help="for --mqar (default config.json)"
    )
    parser.add_argument(
        "--steps", type=int, default=2000, help="steps of 64 sequences for --mqar (default 2000)"
    )
    parser.add_argument(
        "--lr", type=float, help="for --mqar: learning rate in place of the config's"
    )
    parser.add_argument("--seed", type=int, help="for --mqar: seed in place of the config's")
    args = parser.parse_args()
    if not args.checkpoint and not args.mqar:
        raise InputError("checkpoint: give --checkpoint PATH, or --mqar with --config FILE")
    if args.windows < 2 or args.steps < 1:
        raise InputError("windows must be at least 2, steps at least 1")
    result: dict = {}
    if args.checkpoint:
        model, config, tokenizer, folder, _ = load_asked(args.checkpoint, args.tokenizer)
        text = read_tokens(args.data, config, tokenizer, say_on_stderr, folder)
        probes = {
            "nats_by_position": loss_by_position, "repetition_lift_nats": repetition_lift,
            "needle_by_distance": needle_by_distance,
        }  # fmt: skip
        result |= {
            name: probe(model.eval(), text.tokens, config.block_size, args.windows)
            for name, probe in probes.items()
        }
        result |= {
            "data": args.data,
            "text": text.source,
            "text_of_the_run": text.of_run,
            "tokenizer": tokenizer.name,
        }
    if args.mqar:
        config = recall_config(Path(args.config), args.lr, args.seed)
        result |= train_recall(config, args.steps, say=lambda line: print(line, flush=True))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    run_command(main)
