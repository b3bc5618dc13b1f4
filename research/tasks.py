"""Trains small networks on tasks of known difficulty, which text would drown in noise.

    python -m research.tasks recall --models best=configs/best-small.json delta-ngrams --steps 100

- recall: multi-query associative recall (after Arora et al., "Zoology", 2023). 8 pairs of key and
  value, then the keys in another order between filler, each to be answered by its value. Accuracy
  on sequences that were never seen; chance is 1 in 128.
- hops: k-hop reasoning (after the task Depo of Allen-Zhu, "Physics of language models: part 4.1",
  2025). The 12 arrows of a random circle in random order, then questions: which is the k-th node
  after this one, k from 1 to 4? Accuracy by k on circles that were never seen; chance is 1 in 12.
- facts: what weights can hold (after the task Capo there, and Allen-Zhu and Li, "Physics of
  language models: part 3.3", 2024). People of a name and four facts, each fact one of 128, in an
  order that changes. A step reads 1,280 people. Bits of all facts that the network knows, 7 less
  its loss in bits for each fact, and those for each of its parameters.

Each network trains from its seed in batches of 64 sequences, by its config's optimizer and rate.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.command import InputError, Parser, run_command
from common.files import write_whole
from config import Config, make_config
from research.contestants import KNOWN, Contestant, contestant
from research.tables import markdown_table, mean_deviation
from training.optimizers import learning_rate, make_optimizers, rates, step_at_rate

BATCH = 64  # sequences in a step
NONE = -100  # an answer that is not asked for
HELD_OUT = 2**40  # batches of this number on are of the test, those before of training

Batch = tuple[Tensor, Tensor]  # ids and answers, both (rows, length) int64


@dataclass(frozen=True)
class Task:
    """make: rows and a number → a batch, in which an answer stands where the token before it has
    been read; measure: of a network → figures by name."""

    vocabulary: int
    length: int
    make: Callable[[int, int], Batch]
    measure: Callable[[nn.Module], dict[str, float]]


def distinct(generator: torch.Generator, rows: int, high: int, count: int) -> Tensor:
    """(rows, count) numbers below `high` in random order, none twice in a row."""
    return torch.rand(rows, high, generator=generator).argsort(1)[:, :count]


@torch.inference_mode()
def each_answer(model: nn.Module, batch: Batch, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What `of` makes of the logits (n, V) and the answers (n,), for all answers of the batch in
    their order."""
    model.eval()
    found = []
    for ids, answers in zip(*(part.split(BATCH) for part in batch), strict=True):
        asked = answers != NONE
        found.append(of(model(ids)[0][asked].float(), answers[asked]))
    return torch.cat(found).double()


def right(logits: Tensor, answers: Tensor) -> Tensor:
    return logits.argmax(-1) == answers


# ===== Multi-query associative recall

# Id 0 is the filler, 1 to 128 are keys, 129 to 256 values.
PAIRS = 8
RECALL_LENGTH = 128
KEYS = 128
VALUES = 128


def recall_batch(rows: int, number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    keys = 1 + distinct(generator, rows, KEYS, PAIRS)
    values = 1 + KEYS + torch.randint(VALUES, (rows, PAIRS), generator=generator)
    ids = torch.zeros(rows, RECALL_LENGTH, dtype=torch.int64)
    answers = torch.full((rows, RECALL_LENGTH), NONE)
    ids[:, 0 : 2 * PAIRS : 2] = keys
    ids[:, 1 : 2 * PAIRS : 2] = values
    # where keys are asked for
    places = 2 * PAIRS + distinct(generator, rows, RECALL_LENGTH - 2 * PAIRS, PAIRS)
    ids.scatter_(1, places, keys)
    answers.scatter_(1, places, values)
    return ids, answers


def recall_accuracy(model: nn.Module, rows: int) -> dict[str, float]:
    return {"accuracy": each_answer(model, recall_batch(rows, HELD_OUT), right).mean().item()}


# ===== k-hop reasoning

# Ids 0 to 3 say how many hops are asked for, the others are nodes.
HOPS = 4
NODES = 64  # names, of which a circle has
CIRCLE = 12
QUESTIONS = 16  # each the number of hops, a node, and its answer
HOPS_LENGTH = 2 * CIRCLE + 3 * QUESTIONS


def hops_batch(rows: int, number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    circle = HOPS + distinct(generator, rows, NODES, CIRCLE)
    order = distinct(generator, rows, CIRCLE, CIRCLE)
    arrows = torch.stack([circle, circle.roll(-1, dims=1)], dim=-1)  # (rows, CIRCLE, 2)
    arrows = arrows.gather(1, order[..., None].expand_as(arrows))
    place = torch.randint(CIRCLE, (rows, QUESTIONS), generator=generator)
    hops = torch.randint(HOPS, (rows, QUESTIONS), generator=generator)  # less one
    wanted = circle.gather(1, (place + hops + 1) % CIRCLE)
    questions = torch.stack([hops, circle.gather(1, place), wanted], dim=-1)
    ids = torch.cat([arrows.flatten(1), questions.flatten(1)], dim=1)
    answers = torch.full_like(ids, NONE)
    answers[:, 2 * CIRCLE + 1 :: 3] = wanted  # behind the node that is asked about
    return ids, answers


def hops_accuracy(model: nn.Module, rows: int) -> dict[str, float]:
    ids, answers = hops_batch(rows, HELD_OUT)
    good = each_answer(model, (ids, answers), right)
    hops = ids[:, 2 * CIRCLE :: 3].flatten()
    return {f"accuracy_{k + 1}": good[hops == k].mean().item() for k in range(HOPS)}


# ===== What weights can hold

# Ids 0 to 3 name what kind of fact comes next, 4 to 131 are facts, the others parts of names.
KINDS = 4
FACTS = 128
PARTS = 256  # of names; three make one
PERSON = 3 + 2 * KINDS  # tokens
PEOPLE_IN_ONE = 20  # people whom a sequence tells of
FACTS_LENGTH = PEOPLE_IN_ONE * PERSON


class People:
    """So many people, with names of three parts (no two have the same) and KINDS facts each, drawn
    once for all networks."""

    def __init__(self, count: int):
        # the most for which names can be drawn at random and hardly one is drawn twice
        most = PARTS**3 // 16
        if not PEOPLE_IN_ONE <= count <= most:
            raise InputError(f"people: {count} given; it must be from {PEOPLE_IN_ONE} to {most}")
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(PARTS**3, (2 * count + 100,), generator=generator).unique()
        drawn = drawn[torch.randperm(len(drawn), generator=generator)[:count]]
        parts = torch.stack([drawn // PARTS**i % PARTS for i in (2, 1, 0)], dim=1)
        self.names = KINDS + FACTS + parts  # (count, 3)
        self.facts = KINDS + torch.randint(FACTS, (count, KINDS), generator=generator)

    def told(self, who: Tensor, generator: torch.Generator) -> Batch:
        """Sequences about the people `who` (rows, PEOPLE_IN_ONE), the facts of each in a random
        order."""
        order = torch.rand(*who.shape, KINDS, generator=generator).argsort(-1)
        facts = self.facts[who].gather(-1, order)  # (rows, people, KINDS)
        both = torch.stack([order, facts], dim=-1).flatten(2)  # kind, fact, kind, fact, …
        ids = torch.cat([self.names[who], both], dim=-1)  # (rows, people, PERSON)
        answers = torch.full_like(ids, NONE)
        answers[..., 3::2] = facts  # behind the kind
        return ids.flatten(1), answers.flatten(1)

    def batch(self, rows: int, number: int) -> Batch:
        """Everybody once in some order, then in another: batch `number` of an order without end."""
        count = len(self.names)
        first = number * rows * PEOPLE_IN_ONE
        at = torch.arange(first, first + rows * PEOPLE_IN_ONE)
        who = torch.empty_like(at)
        for turn in (at // count).unique().tolist():
            order = torch.randperm(count, generator=torch.Generator().manual_seed(turn))
            here = at // count == turn
            who[here] = order[at[here] % count]
        return self.told(who.view(rows, PEOPLE_IN_ONE), torch.Generator().manual_seed(number))

    def known(self, model: nn.Module) -> dict[str, float]:
        """What the network knows of everybody, asked in a new order."""
        count = len(self.names)
        filled = -(-count // PEOPLE_IN_ONE) * PEOPLE_IN_ONE
        generator = torch.Generator().manual_seed(HELD_OUT)
        who = torch.randperm(count, generator=generator).repeat(2)[:filled]
        batch = self.told(who.view(-1, PEOPLE_IN_ONE), generator)
        nats = each_answer(model, batch, partial(F.cross_entropy, reduction="none"))
        nats = nats[: count * KINDS]  # nobody twice
        bits = max(0.0, math.log2(FACTS) - nats.mean().item() / math.log(2)) * len(nats)
        parameters = sum(p.numel() for p in model.parameters())
        return {"kilobits_known": bits / 1000, "bits_a_parameter": bits / parameters}


# ===== Training


def task_of(name: str, people: int = 20_000, rows: int = 256) -> Task:
    """people: of "facts"; rows: unseen sequences by which the other tasks are measured."""
    if name == "recall":
        vocabulary = 1 + KEYS + VALUES
        return Task(vocabulary, RECALL_LENGTH, recall_batch, partial(recall_accuracy, rows=rows))
    if name == "hops":
        return Task(HOPS + NODES, HOPS_LENGTH, hops_batch, partial(hops_accuracy, rows=rows))
    everybody = People(people)
    return Task(KINDS + FACTS + PARTS, FACTS_LENGTH, everybody.batch, everybody.known)


def entrant_of(model: str, length: int, lr: float | None = None) -> Contestant:
    """A contestant of compare.py without dropout of any kind, with another learning rate if one is
    given."""
    entrant = contestant(model, length)
    if entrant.config.token_features:
        raise InputError(f"{model}: token_features: these tokens have no text; set it to false")
    places = ("embedding", "projection", "mixer", "mlp", "lm_head")
    changes: dict = {f"dropout_{place}": 0.0 for place in places}
    changes |= {"lifting_dropout": 0.0, "stochastic_depth_rate": 0.0}
    if lr is not None:
        changes |= rates(entrant.config, lr)
    config = make_config(entrant.config.model_dump() | changes, model)
    return Contestant(entrant.name, config, entrant.build)


def train(
    entrant: Contestant, task: Task, seed: int, steps: int, batch: int = BATCH, say=print
) -> dict[str, float]:
    """Trains a network from `seed` on the task; returns what the task measures, and the CPU
    seconds."""
    config: Config = entrant.config
    torch.manual_seed(seed)
    model = entrant.build(config, task.vocabulary)
    optimizers = make_optimizers(model, config)
    began = time.process_time()
    for step in range(steps):
        ids, answers = task.make(batch, seed * 2**20 + step)  # no seed's steps are another's
        loss = F.cross_entropy(model(ids)[0].flatten(0, 1), answers.flatten(), ignore_index=NONE)
        loss.backward()
        step_at_rate(model, optimizers, learning_rate(step, steps, config), config.grad_clip)
        if (step + 1) % max(1, steps // 10) == 0:
            say(f"step {step + 1}/{steps}  loss {loss.item():.4f}")
    seconds = time.process_time() - began
    return task.measure(model) | {"cpu_seconds": seconds}


def read_arguments():
    parser = Parser(__doc__.split("\n", 1)[0])
    parser.add_argument("task", choices=["recall", "hops", "facts"])
    parser.add_argument(
        "--models",
        nargs="+",
        default=["best=configs/best-small.json"],
        metavar="MODEL",
        help=f"{KNOWN} (default best=configs/best-small.json)",
    )
    parser.add_argument("--steps", type=int, default=1000, help="of 64 sequences (default 1000)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each network (default 1)")
    parser.add_argument("--lr", type=float, help="learning rate in place of each config's")
    parser.add_argument("--people", type=int, default=20_000, help="for facts (default 20000)")
    parser.add_argument("--json", metavar="FILE", help="write all figures here after each run")
    args = parser.parse_args()
    if min(args.steps, args.seeds) < 1:
        raise InputError("steps and seeds must be at least 1")
    return args


def keep(args, found: dict[str, list[dict[str, float]]]) -> None:
    """Writes the figures found so far to the file of --json."""
    if args.json:
        result = {"task": args.task, "steps": args.steps, "runs": found}
        write_whole(Path(args.json), (json.dumps(result, indent=1) + "\n").encode())


def main() -> None:
    args = read_arguments()
    task = task_of(args.task, args.people)
    entrants = [entrant_of(model, task.length, args.lr) for model in args.models]
    found: dict[str, list[dict[str, float]]] = {entrant.name: [] for entrant in entrants}
    if len(found) < len(entrants):
        raise InputError("models: two have one name; give NAME=FILE other names")
    keep(args, found)  # before hours are spent: a folder may be missing
    for seed in range(1, args.seeds + 1):
        for entrant in entrants:
            print(f"{entrant.name}, seed {seed}", flush=True)
            figures = train(
                entrant, task, seed, args.steps, say=lambda line: print(line, flush=True)
            )
            print(json.dumps(figures), flush=True)
            found[entrant.name].append(figures)
            keep(args, found)
    names = list(found[entrants[0].name][0])
    rows = [
        [model, *(mean_deviation([run[name] for run in runs]) for name in names)]
        for model, runs in found.items()
    ]
    print(markdown_table(["network", *names], rows))


if __name__ == "__main__":
    run_command(main)
