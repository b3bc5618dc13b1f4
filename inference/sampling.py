"""From logits to text: how the next token is chosen, for a whole batch of texts at once, without
any I/O.

`generate` is the loop; the rules it follows are the functions before it, each of them pure. No rule
ever reads text again: what a strategy tries out, it tries on forked states (`state.select`).
Letters: R rows (texts), V vocabulary, k candidates."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common.command import InputError
from config import LOWEST_TEMPERATURE, MOST, Config
from data.tokenizer import Tokenizer
from inference.endings import Endings
from inference.graphs import GraphedStep, graphed

# of probabilities as whole numbers: fp64, in which random numbers come, holds the sum of them
# exactly
UNIT = 2.0**48
# texts get room for a multiple of so many tokens, so that one graph serves texts of many lengths
ROOM = 1024
# prompt tokens read at once: enough to keep the matrix products busy, and their memory is bounded
PREFILL = 512
# Wavelet coherence: how often it is looked at, over how many tokens, and what it does (see
# `tightened`).
COHERENCE_EVERY, COHERENCE_SPAN, COHERENCE_THRESHOLD, COHERENCE_LEAST = 16, 128, 0.5, 0.5


@dataclass(frozen=True)
class Settings:
    """How text is sampled. Raises `InputError`, naming the setting, for a value that has no
    meaning."""

    # 0 = the most probable token; with entropy_adaptive the highest temperature
    temperature: float = 1.0
    top_p: float = 0.95
    repetition_penalty: float = 1.1
    top_k: int = 0  # the most probable tokens that may be drawn; 0 = all
    min_p: float = 0.0  # the least probability of a token, in units of the highest
    seed: int = 1337
    n: int = 1  # samples of each prompt, all in one batch
    best_of_n: int = 1  # texts tried for each sample; the most probable one stays
    context: Literal["stream", "window"] = "stream"
    entropy_adaptive: bool = False
    min_temperature: float = 0.5  # of entropy_adaptive
    lookahead_k: int = 1  # 1 = no lookahead
    lookahead_depth: int = 4
    wavelet_coherence: bool = False

    def __post_init__(self):
        warm = f"from {LOWEST_TEMPERATURE} to {MOST}"
        limits = {
            "temperature": (
                self.temperature == 0 or LOWEST_TEMPERATURE <= self.temperature <= MOST,
                f"0 (the most probable token) or {warm}",
            ),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (
                1 <= self.repetition_penalty <= MOST,
                f"from 1 (none) to {MOST}",
            ),
            "top_k": (0 <= self.top_k <= MOST, f"from 0 (all) to {MOST}"),
            "min_p": (0 <= self.min_p <= 1, "from 0 (all) to 1"),
            "seed": (self.seed >= 0, "0 or more"),
            "n": (1 <= self.n <= MOST, f"from 1 to {MOST}"),
            "best_of_n": (1 <= self.best_of_n <= MOST, f"from 1 to {MOST}"),
            "context": (self.context in ("stream", "window"), "stream or window"),
            "min_temperature": (LOWEST_TEMPERATURE <= self.min_temperature <= MOST, warm),
            "lookahead_k": (1 <= self.lookahead_k <= MOST, f"from 1 (none) to {MOST}"),
            "lookahead_depth": (1 <= self.lookahead_depth <= MOST, f"from 1 to {MOST}"),
        }
        for name, (good, right) in limits.items():
            if not good:
                raise InputError(
                    f"{name}: {getattr(self, name)} is out of range; it must be {right}"
                )

    @property
    def rows(self) -> int:
        """Texts generated for each prompt."""
        return self.n * self.best_of_n


class Sample(NamedTuple):
    """Generated texts: ids (rows, T + N), the prompt's T tokens first; for each of the N new tokens
    its log-probability (rows, N) and the entropy of the distribution it came from (rows, N), in
    nats, both under the model's own softmax. `lengths` (rows,) are the new tokens up to where each
    text ended; None = all N."""

    ids: Tensor
    log_probs: Tensor
    entropy: Tensor
    lengths: Tensor | None = None


# ===== Rules


def penalised(logits: Tensor, factor: Tensor | None) -> Tensor:
    """Logits of tokens seen before, positive ones divided and negative ones multiplied by the
    repetition penalty (Keskar et al., "CTRL", 2019). factor (R, V): the penalty, ≥ 1, where a row's
    text has the token, else 1; None = no penalty."""
    return logits if factor is None else torch.minimum(logits / factor, logits * factor)


def entropy_of(log_p: Tensor) -> Tensor:
    """The entropy (R,), in nats, of log-probabilities (R, V)."""
    return -(log_p.exp() * log_p).sum(-1)


def adaptive_temperature(entropy: Tensor, vocab_size: int, lowest: float, highest: float) -> Tensor:
    """T = T_max − H / ln V · (T_max − T_min): daring where the model is sure, careful where it is
    not. H (R,) in nats."""
    return highest - entropy / math.log(vocab_size) * (highest - lowest)


def in_units(probs: Tensor) -> Tensor:
    """Probabilities as whole numbers of 1 / UNIT, whose sums are the same in whatever order a
    device adds them."""
    return (probs * UNIT).long().clamp(min=0)  # what is not a number becomes one below 0


def highest(probs: Tensor, top_k: int, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """The top_k highest probabilities, equals by id, with 0 for all others (R, V); and top_p (R, 1)
    of what they hold together, as a share of the whole. All shapes are fixed, and nothing asks the
    device."""
    if not 0 < top_k < probs.size(1):
        return probs, top_p
    least = probs.topk(top_k, sorted=False).values.amin(1, keepdim=True)
    above = probs > least
    equal = probs == least
    room = top_k - above.sum(1, keepdim=True)
    taken = above | (equal & (equal.cumsum(1) <= room))
    probs = probs * taken
    return probs, top_p * (in_units(probs).sum(1, keepdim=True).double() / UNIT)


def far_below(probs: Tensor, min_p: float) -> Tensor:
    """Where a probability is below min_p times the row's highest: (R, V) bool."""
    return probs < min_p * probs.amax(1, keepdim=True)


def nucleus(probs: Tensor, top_p: Tensor) -> Tensor:
    """The probabilities of the smallest set of tokens that reach top_p, 0 for all others: (R, V) in
    units of 1 / UNIT.

    Tokens are taken in falling order, equals by id: one is in the set where those before it hold
    less than top_p. Nothing is sorted: the last token's probability is found digit by digit, from
    the highest, by adding up the tokens that have each digit, in whole numbers (`in_units`).

    probs (R, V) fp32, top_p (R, 1).
    """
    mass = in_units(probs)
    # At least one token, and no more than there are: rounding may leave a little less than 1 in
    # all.
    missing = torch.minimum((top_p * UNIT).long(), mass.sum(1, keepdim=True)).clamp(min=1)
    # The bits of a positive float, read as a whole number, are in the order of the floats. Turned
    # round, a key falls as the probability rises. Up to the bits of 1 it has 30 digits.
    keys = 2**30 - 1 - probs.contiguous().view(torch.int32).long()
    # bits of a digit: few passes, and a sum for each value of a digit
    width = 15 if probs.size(1) >= 2**14 else 10
    # the last token's digits so far; the mass of those that have the same
    last, equal = torch.zeros_like(missing), mass
    for shift in range(30 - width, -1, -width):
        digits = (keys >> shift) & (2**width - 1)
        before = mass.new_zeros(len(mass), 2**width + 1)
        before[:, 1:].scatter_add_(1, digits, equal)
        before = before.cumsum(1)  # what tokens of a lower digit hold
        digit = torch.searchsorted(before, missing) - 1
        missing = missing - before.gather(1, digit)
        equal = equal * (digits == digit)
        last = (last << width) + digit
    return mass * (keys < last) + equal * (equal.cumsum(1) - equal < missing)


def draw(
    probs: Tensor, top_p: Tensor, uniform: Tensor, top_k: int = 0, min_p: float = 0.0
) -> Tensor:
    """Draws a token (R,) from each row's nucleus (Holtzman et al., "The curious case of neural text
    degeneration", 2020) among its top_k most probable tokens, without those far below the highest
    (Nguyen et al., "Turning up the heat: min-p sampling", 2024).

    probs (R, V) fp32, top_p (R, 1), uniform (R, 1) fp64 in [0, 1). It is a fixed amount of work,
    for which the host need not wait. Tokens are drawn by the inverse of the cumulative distribution
    in order of id: unlike falling order, it hardly moves when rounding (another batch size, another
    kernel) swaps two tokens of nearly the same probability."""
    probs, top_p = highest(probs, top_k, top_p)
    mass = nucleus(probs, top_p)
    if min_p > 0:
        mass = mass.masked_fill(far_below(probs, min_p), 0)
    cumulative = mass.cumsum(1)
    target = (uniform * cumulative[:, -1:]).long()
    token = torch.searchsorted(cumulative, target, right=True)
    # where probabilities are not finite there may be no such token
    return token.clamp(max=probs.size(1) - 1).squeeze(1)


def haar_mean(embedded: Tensor, levels: int) -> Tensor:
    """The mean over positions of the coarsest Haar approximation of embedded (R, T, C): (R, C).

    At position t the undecimated approximation after `levels` levels is 2^(−levels/2) times the sum
    of the last 2^levels embeddings, zeros before the start. So in the mean the embedding at s
    counts min(2^levels, T − s) times."""
    length = embedded.size(1)
    times = (
        torch.arange(length, 0, -1, device=embedded.device).clamp(max=2**levels).to(embedded.dtype)
    )
    return (times @ embedded) * (2 ** (-levels / 2) / length)


def tightened(top_p: float, coherence: Tensor) -> Tensor:
    """top_p · clamp(coherence / threshold, least, 1): below the threshold the nucleus shrinks, to
    `least` at the worst."""
    return top_p * (coherence / COHERENCE_THRESHOLD).clamp(COHERENCE_LEAST, 1)


# ===== Reading


def window_start(length: int, block_size: int) -> int:
    """The first of `length` tokens that a window's state still holds: whenever block_size tokens
    are held and one more comes, the state starts anew from the last block_size // 2 and the new
    one."""
    stride = block_size - block_size // 2
    return max(0, -(-(length - block_size) // stride)) * stride


class Reader:
    """A decoder and its state, which goes past block_size as `context` says.

    "stream": the state is carried on for ever, its running mean over the last block_size positions.
    "window": the state never holds more than block_size tokens, positions start at 0 and there are
    zeros before it, as in training."""

    def __init__(self, decoder, context: str):
        self.decoder, self.block_size, self.stream = (
            decoder,
            decoder.config.block_size,
            context == "stream",
        )
        self._state, self.step, self.held = None, None, 0

    @property
    def state(self):
        """What the decoder keeps of the texts so far. On a GPU it lies in `step` while single
        tokens are read."""
        return self._state if self.step is None else self.step.state()

    @state.setter
    def state(self, state) -> None:
        self._state, self.step = state, None

    def load_step(self, rows: int) -> None:
        """Goes on by the step as a CUDA graph, where there is one."""
        step = graphed(self.decoder, rows, self.stream)
        if step is not None:
            if step.reader is not None and step.reader.step is step:  # it was another's until now
                step.reader.state = step.state()
            step.load(self._state)
            step.reader, self.step, self._state = self, step, None

    def fork(self, rows: Tensor) -> "Reader":
        """A reader of these rows' texts, in any order and number."""
        other = Reader(self.decoder, "stream" if self.stream else "window")
        other.state, other.held = self.state.select(rows), self.held
        return other

    def start(self, ids: Tensor) -> Tensor:
        """Reads ids (R, T) from the start, in bounded pieces. Returns the logits after the last,
        (R, V) in fp32."""
        if not self.stream:
            ids = ids[:, window_start(ids.size(1), self.block_size) :]
        self.state, self.held = self.decoder.start(len(ids), stream=self.stream), 0
        for piece in ids.split(PREFILL, dim=1):
            logits = self.read(piece)
        return logits

    def read(self, ids: Tensor) -> Tensor:
        """Reads on: ids (R, T), for which there must be room. Returns the logits after the last,
        (R, V) in fp32, which may be overwritten by the next call."""
        self.held += ids.size(1)
        if ids.size(1) == 1 and self.step is None:
            self.load_step(len(ids))
        if ids.size(1) == 1 and self.step is not None:
            return self.step(ids)
        logits, self.state = self.decoder(ids, self.state)
        return logits[:, -1].float()

    def make_room(self, text: Tensor) -> None:
        """Before a token is read after `text` (R, n): in a full window the state is rebuilt from
        the last half."""
        if not self.stream and self.held == self.block_size:
            self.start(text[:, text.size(1) - self.block_size // 2 :])


def look_ahead(
    reader: Reader,
    logits: Tensor,
    probs: Tensor,
    top_p: Tensor,
    factor: Tensor | None,
    settings: Settings,
):
    """Tries the lookahead_k most probable tokens of the nucleus: each is read by a fork of the
    state and followed by the greedy text of lookahead_depth tokens. The one whose own
    log-probability plus that of its text is highest is taken; both are under the penalised softmax,
    since tokens that the penalty will not let pass should not raise a score.

    All R·k forks are one batch, so it costs lookahead_depth calls. logits (R, V) are penalised.
    Returns the tokens (R,); the reader has read them, and the logits after them (R, V), as from
    `Reader.read`, come second."""
    k = min(settings.lookahead_k, logits.size(1))
    depth = settings.lookahead_depth
    probs, top_p = highest(probs, settings.top_k, top_p)
    best, candidates = probs.topk(k)
    score = logits.log_softmax(-1).gather(1, candidates)
    # what could not be drawn is no candidate; the first always is one
    outside = (best.cumsum(1) - best >= top_p) | far_below(best, settings.min_p)
    score = score.masked_fill(outside, -math.inf).flatten()

    rows = torch.arange(len(logits), device=logits.device).repeat_interleave(k)
    token = candidates.flatten()[:, None]  # (R·k, 1)
    fork = reader.fork(rows)
    after = fork.read(token).clone()
    state = fork.state  # after the candidates: one of them is gone on from
    if factor is not None:
        factor = factor[rows].scatter_(1, token, settings.repetition_penalty)
    ahead = after
    for step in range(depth):
        value, token = penalised(ahead, factor).log_softmax(-1).max(-1, keepdim=True)
        score = score + value.squeeze(1)
        if step + 1 == depth:
            break
        if step == 0 and fork.step is None:  # a call may change the state that it is given
            fork.state = state.select(torch.arange(len(rows), device=rows.device))
        if factor is not None:
            factor.scatter_(1, token, settings.repetition_penalty)
        ahead = fork.read(token)
    chosen = score.view(-1, k).argmax(1) + k * torch.arange(len(logits), device=rows.device)
    reader.state, reader.held = state.select(chosen), reader.held + 1
    return candidates.flatten()[chosen], after[chosen]


# ===== The loop


def kind_of(settings: Settings, room: int) -> tuple[Settings, int]:
    """What a graph of the rules is made for: all but what lies in tensors, and what is done before
    and after it."""
    return replace(settings, seed=0, top_p=1.0, n=1, best_of_n=1, wavelet_coherence=False), room


class Rules:
    """The settings at work on R texts: the texts, what is remembered of each, and how its next
    token is chosen.

    What a token needs and gives lies in tensors that stay where they are, in the column of its
    place in the text, and a counter on the device says which column that is. So the host has no
    part in choosing a token, and on a GPU reading one and choosing the next is one graph."""

    def __init__(self, settings: Settings, rows: int, room: int, like: Tensor):
        """room: the most tokens of a text with its prompt; like (R, V): logits, for their width and
        device."""
        self.settings, self.kind = settings, kind_of(settings, room)
        self.text = like.new_zeros(rows, room, dtype=torch.int64)
        self.log_probs, self.entropy = like.new_zeros(rows, room), like.new_zeros(rows, room)
        # Random numbers, in [0, 1). Apple's GPUs have no fp64, so there the CPU draws a token.
        self.draws_on = torch.device("cpu") if like.device.type == "mps" else like.device
        self.numbers = torch.zeros(rows, room, dtype=torch.float64, device=self.draws_on)
        self.at = like.new_zeros(1, dtype=torch.int64)  # the column of the next token
        self.token = like.new_zeros(rows, 1, dtype=torch.int64)  # the last that was chosen
        self.top_p = like.new_zeros(rows, 1)
        # (R, V), see `penalised`
        self.factor = None if settings.repetition_penalty == 1 else torch.ones_like(like)
        self.turn: tuple[GraphedStep, Callable[[], None]] | None = None  # see `read_and_choose`

    def begin(
        self,
        settings: Settings,
        prompts: Tensor,
        num_tokens: int,
        levels: int,
        embedding: Tensor | None,
    ) -> None:
        """Starts anew after prompts (R, T); embedding (V, C) is needed for wavelet_coherence
        only."""
        length = prompts.size(1)
        self.settings, self.levels, self.embedding = settings, levels, embedding
        self.text[:, :length] = prompts
        self.at.fill_(length)
        self.top_p.fill_(settings.top_p)
        if self.factor is not None:
            self.factor.fill_(1).scatter_(1, prompts, settings.repetition_penalty)
        if settings.wavelet_coherence:
            self.theme = self.summary(prompts)
        # A generator for each row, so that no row's text depends on the rows beside it.
        generators = [np.random.default_rng((settings.seed, row)) for row in range(len(prompts))]
        numbers = torch.from_numpy(
            np.stack([generator.random(num_tokens) for generator in generators])
        )
        self.numbers[:, length : length + num_tokens] = numbers.to(self.numbers.device)

    def summary(self, text: Tensor) -> Tensor:
        return haar_mean(self.embedding[text].float(), self.levels)

    def look_back(self, text: Tensor) -> None:
        """Wavelet coherence: tightens top_p where the end of text (R, n) has strayed from the
        prompt."""
        coherence = torch.cosine_similarity(
            self.theme, self.summary(text[:, -COHERENCE_SPAN:]), dim=-1
        )
        self.top_p.copy_(tightened(self.settings.top_p, coherence)[:, None])

    def probabilities(self, logits: Tensor, entropy: Tensor) -> Tensor:
        """The softmax of penalised logits (R, V) at the temperature that is due; at 1 where only
        the order counts."""
        temperature = self.settings.temperature
        if self.settings.entropy_adaptive and temperature > 0:
            lowest = min(self.settings.min_temperature, temperature)
            return (
                logits / adaptive_temperature(entropy, logits.size(1), lowest, temperature)[:, None]
            ).softmax(-1)
        return (logits / (temperature or 1.0)).softmax(-1)

    def choose(self, logits: Tensor) -> None:
        """Chooses the tokens that logits (R, V) are of. The host is asked nothing, so a graph may
        hold it."""
        log_p = logits.log_softmax(-1)
        entropy = entropy_of(log_p)
        logits = penalised(logits, self.factor)
        if self.settings.temperature == 0:
            token = logits.argmax(-1)
        else:
            token = draw(
                self.probabilities(logits, entropy).to(self.draws_on),
                self.top_p.to(self.draws_on),
                self.numbers.index_select(1, self.at.to(self.draws_on)),
                self.settings.top_k,
                self.settings.min_p,
            ).to(logits.device)
        self.take(token, log_p, entropy)

    def choose_ahead(self, logits: Tensor, reader: Reader, text: Tensor) -> Tensor:
        """As `choose`, by `look_ahead` after text (R, n), which reads the tokens: returns the
        logits after them (R, V)."""
        log_p = logits.log_softmax(-1)
        entropy = entropy_of(log_p)
        logits = penalised(logits, self.factor)
        reader.make_room(text)
        probs = self.probabilities(logits, entropy)
        token, after = look_ahead(reader, logits, probs, self.top_p, self.factor, self.settings)
        self.take(token, log_p, entropy)
        return after

    def take(self, token: Tensor, log_p: Tensor, entropy: Tensor) -> None:
        """Writes down the tokens (R,) that were chosen, from log-probabilities (R, V) of that
        entropy (R,)."""
        self.token.copy_(token[:, None])
        if self.factor is not None:
            self.factor.scatter_(1, self.token, self.settings.repetition_penalty)
        self.text.index_copy_(1, self.at, self.token)
        self.log_probs.index_copy_(1, self.at, log_p.gather(1, self.token))
        self.entropy.index_copy_(1, self.at, entropy[:, None])
        self.at.add_(1)

    def read_and_choose(self, reader: Reader) -> None:
        """Reads the tokens chosen last, for which there must be room, and chooses those that
        follow: on a GPU one replay."""
        if reader.step is None:
            reader.load_step(len(self.token))
        if reader.step is None:
            self.choose(reader.read(self.token))
            return
        if self.turn is None or self.turn[0] is not reader.step:
            self.turn = reader.step, reader.step.then(self.token, self.choose)
        reader.held += 1
        self.turn[1]()


def rules_for(
    reader: Reader, settings: Settings, prompts: Tensor, num_tokens: int, logits: Tensor
) -> Rules:
    """Rules with room for these texts: those that the reader's step keeps of the text before, if
    they are of the same kind, for then there is a graph of them already. `generate` gives them
    back."""
    room = -(-(prompts.size(1) + num_tokens) // ROOM) * ROOM
    step = (
        None if settings.lookahead_k > 1 else graphed(reader.decoder, len(prompts), reader.stream)
    )
    kept = None if step is None else step.kept
    if kept is None or kept.kind != kind_of(settings, room):
        return Rules(settings, len(prompts), room, logits)
    step.kept = None  # nobody else's while this text is written
    return kept


class Post:
    """Hands tokens to a function of the host's. From a GPU they come one step late: those of a step
    are read while the next is at work, so that neither waits for the other."""

    def __init__(self, on_token: Callable[[Tensor], None] | None, endings: Endings | None):
        self.on_token = on_token
        self.endings = endings
        self.coming = None
        self.over = False  # whether all texts have ended

    def send(self, tokens: Tensor) -> None:
        """tokens (R, 1), which may be overwritten after this."""
        if self.on_token is None and self.endings is None:
            return
        if tokens.device.type == "cpu":
            self.take(tokens.flatten().clone())
            return
        coming = tokens.flatten().to("cpu", non_blocking=True)
        there = torch.cuda.Event()
        there.record()
        before, self.coming = self.coming, (coming, there)
        self.hand_over(before)

    def hand_over(self, coming: tuple[Tensor, torch.cuda.Event] | None) -> None:
        if coming is not None:
            tokens, there = coming
            there.synchronize()
            self.take(tokens)

    def take(self, tokens: Tensor) -> None:
        if self.endings is not None:
            self.over = self.endings.add(tokens)
        if self.on_token is not None:
            self.on_token(tokens)

    def end(self) -> None:
        """Hands over what was sent last."""
        coming, self.coming = self.coming, None
        self.hand_over(coming)


# not inference_mode: its tensors could not be given to a network that is being trained
@torch.no_grad()
def generate(
    decoder,
    ids: Tensor,
    num_tokens: int,
    settings: Settings,
    on_token: Callable[[Tensor], None] | None = None,
    embedding: Tensor | None = None,
    endings: Endings | None = None,
) -> Sample:
    """Continues each of the prompts ids (B, T) by `num_tokens` tokens, settings.n times: B·n texts.

    decoder: a `Decoder` or the network itself. on_token(tokens) is called with each step's new
    tokens (B·n·best_of_n,), on the CPU; on a GPU a step later than they are chosen. embedding (V,
    C): the token embedding, for wavelet_coherence. endings: of these texts; when all have ended no
    more tokens are made, and the sample has as many as were made by then. Raises `InputError` for
    an empty prompt, num_tokens < 0 and logits that are not finite."""
    check_request(ids, num_tokens)
    reader = Reader(decoder, settings.context)
    logits, length = reader.start(ids), ids.size(1)
    if settings.rows > 1:
        rows = torch.arange(len(ids), device=ids.device).repeat_interleave(settings.rows)
        ids, logits, reader.state = ids[rows], logits[rows], reader.state.select(rows)
    rules = rules_for(reader, settings, ids, num_tokens, logits)
    rules.begin(settings, ids, num_tokens, decoder.config.levels, embedding)
    post = Post(on_token, endings)
    made = num_tokens

    try:
        for i in range(num_tokens):
            so_far = rules.text[:, : length + i]
            if settings.wavelet_coherence and i and i % COHERENCE_EVERY == 0:
                rules.look_back(so_far)
            if settings.lookahead_k > 1:
                logits = rules.choose_ahead(logits, reader, so_far)
            elif i == 0:
                rules.choose(logits)
            else:
                reader.make_room(so_far[:, :-1])
                rules.read_and_choose(reader)
            post.send(rules.token)
            if post.over:
                made = i + 1
                break
    finally:
        post.end()  # when it is stopped on the way, too

    new = slice(length, length + made)
    text = rules.text[:, : new.stop].clone()
    log_probs = rules.log_probs[:, new].clone()
    entropy = rules.entropy[:, new].clone()
    lengths = None if endings is None else torch.tensor(endings.counts, device=ids.device)
    if rules.turn is not None:
        rules.turn[0].kept = rules
    if not log_probs.isfinite().all():
        raise InputError(
            "checkpoint: gives logits that are not finite, so no text can be sampled; train it anew"
        )
    sample = Sample(text, log_probs, entropy, lengths)
    return best_of(sample, settings.best_of_n) if settings.best_of_n > 1 else sample


def check_request(ids: Tensor, num_tokens: int) -> None:
    """Raises `InputError` where there is nothing to continue, or fewer than no tokens to make."""
    if ids.size(1) == 0:
        raise InputError("prompt: has no tokens; give some text to go on from")
    if num_tokens < 0:
        raise InputError(f"num_tokens: {num_tokens} is out of range; it must be 0 or more")


def best_of(sample: Sample, n: int) -> Sample:
    """Of each n texts in a row the one whose mean log-probability is highest."""
    means = (sample.log_probs * own_tokens(sample)).sum(1)
    if sample.lengths is not None:  # else all are of one length, and sums order them as means do
        means = means / sample.lengths.clamp(min=1)
    tries = means.view(-1, n)
    best = tries.argmax(1) + n * torch.arange(len(tries), device=tries.device)
    return Sample(*(None if part is None else part[best] for part in sample))


def own_tokens(sample: Sample) -> Tensor:
    """Which of its new tokens each text has, up to where it ended: (rows, N) bool."""
    places = torch.arange(sample.log_probs.size(1), device=sample.ids.device)
    if sample.lengths is None:
        return torch.ones_like(sample.log_probs, dtype=torch.bool)
    return places < sample.lengths[:, None]


def measure(sample: Sample, prompt_length: int) -> dict[str, float]:
    """Means over the texts of a sample: log-probability and entropy per new token in nats, and of
    the new tokens Distinct-n, the share of different n-grams (Li et al., 2016), and Rep-4 = 1 −
    Distinct-4 (Welleck et al., 2020)."""
    own = own_tokens(sample)
    texts = [
        row[kept].tolist() for row, kept in zip(sample.ids[:, prompt_length:], own, strict=True)
    ]
    values = {
        "mean_log_probability": sample.log_probs[own].mean().item(),
        "entropy": sample.entropy[own].mean().item(),
    }
    for n in (1, 2, 3):
        values[f"distinct_{n}"] = sum(distinct(text, n) for text in texts) / len(texts)
    values["rep_4"] = 1 - sum(distinct(text, 4) for text in texts) / len(texts)
    return values


def distinct(tokens: Sequence[int], n: int) -> float:
    """The share of different n-grams among all of `tokens`; 1 where there are none, since then none
    is repeated."""
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


# ===== For other scripts


def settings_of(config: Config) -> Settings:
    """The settings that a run's config asks for."""
    keys = ("temperature", "top_p", "repetition_penalty", "seed")
    return Settings(context=config.eval_context, **{key: getattr(config, key) for key in keys})


def bare_prompt(prompt: str, tokenizer: Tokenizer) -> str:
    """`prompt` without spaces at its end, where a word's token begins with the space before it:
    after a space of its own a model has seen hardly any word begin, so it would say something else
    than it means. A prompt of spaces alone stays."""
    bare = prompt.rstrip(" ")
    return bare if bare and tokenizer.spaced else prompt


def sample_text(model: nn.Module, tokenizer: Tokenizer, config: Config, num_tokens: int) -> str:
    """The config's `bare_prompt`, continued by the model as it is: plain text. Leaves the model in
    the mode that it was in."""
    was_training = model.training
    device = next(model.parameters()).device
    ids = torch.tensor(
        [tokenizer.encode(bare_prompt(config.generation_prompt, tokenizer))],
        dtype=torch.int64,
        device=device,
    )
    sample = generate(model.eval(), ids, num_tokens, settings_of(config))
    model.train(was_training)
    return tokenizer.decode(sample.ids[0].tolist())
