"""WaveletLM in lm-evaluation-harness (an optional dependency: pip install '.[evaluation]').

    python -m research.lm_eval_adapter --model waveletlm --model_args checkpoint=logs/RUN \\
        --tasks lambada_openai

It takes every option of the harness's own command, and runs on a GPU where there is one, else on
the CPU, unless --device says. A checkpoint has no token for the beginning of a text: where a task
asks for the probability of a text from its first token on, a line end stands before it.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import evaluate as own_evaluate
from checkpoint import load_asked
from common.command import InputError, run_command
from inference.sampling import Reader, bare_prompt

HERE = Path(__file__).resolve().parents[1]
BEFORE_A_TEXT = "\n"
# Tokens, of all rows together, that are read at a time: bounds memory, and changes no figure.
PIECE = 512
# Texts that are read side by side unless --batch_size says: enough to keep a CPU's matrix products
# busy.
BATCH = 16


@contextlib.contextmanager
def packages_before_ours() -> Iterator[None]:
    """Within it `import evaluate` finds the package of that name, which the harness and many of its
    tasks import, in place of the script beside this file."""
    path = sys.path[:]
    sys.path[:] = [entry for entry in path if Path(entry).resolve() != HERE]
    sys.modules.pop("evaluate", None)
    try:
        yield
    finally:
        sys.path[:] = path
        sys.modules["evaluate"] = own_evaluate


try:
    with packages_before_ours():
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
except ImportError:
    missing = "lm_eval_adapter needs the package lm_eval: pip install '.[evaluation]'"
    if __name__ == "__main__":
        print(f"error: {missing}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(missing) from None


@register_model("waveletlm")
class WaveletAdapter(LM):
    """The harness's requests, answered by a checkpoint. `tokenizer` is that of the commands'
    --tokenizer, for a checkpoint that has none. `context` is that of whole texts and of
    generation past block_size; a continuation's probability always comes from one pass with the
    state carried on. `batch_size` texts of about the same length are read side by side ("auto":
    16), each after the other where it is 1."""

    def __init__(
        self,
        checkpoint: str,
        device: str = "cpu",
        context: str = "stream",
        max_new_tokens: int = 256,
        tokenizer: str = "",
        batch_size: int | str | None = None,
        **_,
    ):
        super().__init__()
        if context not in ("stream", "window"):
            raise InputError(f"context: {context} must be stream or window")
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            raise InputError(f"device: {device}, but torch finds no GPU; give --device cpu")
        self.batch_size = BATCH if str(batch_size or "auto").startswith("auto") else int(batch_size)
        if self.batch_size < 1:
            raise InputError(f"batch_size: {batch_size} must be at least 1")
        loaded = load_asked(str(checkpoint), tokenizer, device)
        self.model = loaded.model
        self.config = loaded.config
        self.tokenizer = loaded.tokenizer
        self.model.eval()
        self._where = device
        self.context = context
        self.max_new_tokens = int(max_new_tokens)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """The tokens of both together, and how many of them are the context's. Spaces between both
        belong to the continuation, whose tokens start with them."""
        spaces = len(context) - len(context.rstrip(" "))
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = self.tokenizer.encode(context or BEFORE_A_TEXT)
        return before + self.tokenizer.encode(continuation), len(before)

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """The indices of texts of these lengths, in batches of about the same length. The longest
        come first, so that a batch that is too large for memory fails at once."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        return [
            order[start : start + self.batch_size]
            for start in range(0, len(order), self.batch_size)
        ]

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): log p(continuation | context) in nats, and whether the
        continuation is what greedy decoding would write."""
        return self.log_probabilities([self.encode_pair(*request.args) for request in requests])

    @torch.inference_mode()
    def log_probabilities(self, pairs: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """For each (ids, before): log p(ids[before:] | ids[:before]) in nats, and whether greedy
        decoding would write the same; `before` is at least 1.

        Shorter texts of a batch are padded on the right, where their predictions don't see it.
        """
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        for batch in self.batches([len(ids) for ids, _ in pairs]):
            rows = [torch.tensor(pairs[i][0]) for i in batch]
            text = pad_sequence(rows, batch_first=True).to(self._where)  # (R, T)
            ends = torch.tensor([[len(pairs[i][0])] for i in batch], device=text.device)  # (R, 1)
            befores = torch.tensor([[pairs[i][1]] for i in batch], device=text.device)
            state = self.model.start(len(batch), stream=True)
            totals = torch.zeros_like(ends[:, 0], dtype=torch.float64)  # (R,)
            greedy = torch.ones_like(ends[:, 0], dtype=torch.bool)
            each = max(1, PIECE // len(batch))
            for piece in text[:, :-1].split(each, dim=1) if text.size(1) > 1 else ():
                logits, state = self.model(piece, state)
                totals, greedy = self.added(totals, greedy, logits, text, befores, ends)
                # Positions are counted from the next piece on.
                text = text[:, piece.size(1) :]
                befores = befores - piece.size(1)
                ends = ends - piece.size(1)
            figures = zip(totals.tolist(), greedy.tolist(), strict=True)
            for i, pair in zip(batch, figures, strict=True):
                results[i] = pair
        return results

    @staticmethod
    def added(
        totals: Tensor, greedy: Tensor, logits: Tensor, text: Tensor, befores: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`totals` (R,) and `greedy` (R,) after the predictions logits (R, n, V) of text[:, 1 : n +
        1], of which those from position `befores` to `ends` (R, 1) count."""
        n = logits.size(1)
        position = torch.arange(1, n + 1, device=text.device)
        counted = (position >= befores) & (position < ends)  # (R, n)
        if not counted.any():
            return totals, greedy
        log_p = logits.float().log_softmax(-1)
        target = text[:, 1 : n + 1]
        own = log_p.gather(2, target[..., None]).squeeze(2).double()
        right = log_p.argmax(-1) == target
        return totals + own.masked_fill(~counted, 0).sum(1), greedy & (right | ~counted).all(1)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """For each text: the log probability of all its tokens, in nats; 0 for an empty one."""
        texts = [
            self.tokenizer.encode(BEFORE_A_TEXT) + self.tokenizer.encode(request.args[0])
            for request in requests
        ]
        first = len(self.tokenizer.encode(BEFORE_A_TEXT))
        if self.context == "stream":
            return [total for total, _ in self.log_probabilities([(ids, first) for ids in texts])]
        block = self.config.block_size
        score = own_evaluate.score
        return [
            -score(self.model, np.array(ids), block, max(1, block // 2), "window", self._where)
            if len(ids) > 1
            else 0.0
            for ids in texts
        ]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Each context's continuation up to the first of its stop texts, which is left out.

        Spaces at a context's end are taken off it: tokens of words begin with their space, so the
        model has hardly seen a word that follows a space of its own. The spaces that it then writes
        are no part of the answer.
        """
        bare = [bare_prompt(request.args[0], self.tokenizer) for request in requests]
        prompts = [self.tokenizer.encode(context or BEFORE_A_TEXT) for context in bare]
        answers = [""] * len(prompts)
        for batch in self.batches([len(prompt) for prompt in prompts]):
            wishes = [
                Wish(
                    self.tokenizer,
                    requests[i].args[1],
                    self.max_new_tokens,
                    bare[i] != requests[i].args[0],
                )
                for i in batch
            ]
            self.continue_texts([prompts[i] for i in batch], wishes)
            for i, wish in zip(batch, wishes, strict=True):
                answers[i] = wish.answer
        return answers

    @torch.inference_mode()
    def continue_texts(self, prompts: Sequence[list[int]], wishes: Sequence["Wish"]) -> None:
        """Continues each prompt as its wish says. All are read in step: where a shorter prompt ends
        its row goes on with what it makes, beside the rest of the longer ones. A row that is done
        leaves the batch."""
        rows = [i for i, wish in enumerate(wishes) if not wish.done]  # the wish of each row
        if not rows:
            return
        reader = Reader(self.model, self.context)
        shortest = min(len(prompts[i]) for i in rows)
        # (R, tokens so far)
        text = torch.tensor([prompts[i][:shortest] for i in rows], device=self._where)
        logits = reader.start(text)
        while True:
            token = torch.zeros_like(text[:, :1])
            for row, i in enumerate(rows):
                if text.size(1) < len(prompts[i]):
                    token[row] = prompts[i][text.size(1)]
                else:
                    token[row] = wishes[i].choose(logits[row])
            left = [row for row, i in enumerate(rows) if not wishes[i].done]
            if not left:
                return
            if len(left) < len(rows):
                rows = [rows[row] for row in left]
                text = text[left]
                token = token[left]
                reader.state = reader.state.select(left)
            reader.make_room(text)
            text = torch.cat([text, token], dim=1)
            logits = reader.read(token)


class Wish:
    """A text that the harness asks for: how its tokens are chosen, those chosen so far, and whether
    it is done."""

    def __init__(self, tokenizer, settings: dict, most: int, spaced: bool = False):
        """settings: the harness's, with "until", "do_sample", "temperature" and "max_gen_toks";
        most: tokens at the most where they don't say; spaced: spaces at the text's beginning belong
        to the prompt, and are left out."""
        stops = settings.get("until") or []
        self.stops = [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop]
        self.temperature = 0.0  # the most probable token, always
        if settings.get("do_sample"):
            self.temperature = float(settings.get("temperature") or 0.0)
        self.tokenizer = tokenizer
        self.most = int(settings.get("max_gen_toks", most))
        self.spaced = spaced
        self.made: list[int] = []
        self.answer = ""
        self.done = self.most < 1

    def choose(self, logits: Tensor) -> int:
        """The next token after logits (V,), which is noted."""
        if self.temperature:
            token = int(torch.multinomial((logits / self.temperature).softmax(-1), 1))
        else:
            token = int(logits.argmax(-1))
        self.made.append(token)
        text = self.tokenizer.decode(self.made)
        self.answer = text.lstrip(" ") if self.spaced else text
        found = [self.answer.index(stop) for stop in self.stops if stop in self.answer]
        if found:
            self.answer = self.answer[: min(found)]
        self.done = bool(found) or len(self.made) >= self.most
        return token


def main() -> None:
    """The harness's command. Its own defaults are a GPU, which may not be there, and one text at a
    time."""
    arguments = sys.argv[1:]
    names = {argument.partition("=")[0] for argument in arguments}
    if names & {"--model", "-M"} and not names & {"--config", "-C"}:
        first = next(
            i for i, argument in enumerate(arguments) if argument.startswith("-")
        )  # what is given comes after, and counts
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        sys.argv[1:] = [
            *arguments[:first],
            "--device",
            device,
            "--batch_size",
            "auto",
            *arguments[first:],
        ]
    with packages_before_ours():
        cli_evaluate()


if __name__ == "__main__":
    run_command(main)
