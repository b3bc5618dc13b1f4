"""WaveletLM in lm-evaluation-harness (an optional dependency: pip install '.[evaluation]').

    python lm_eval_adapter.py --model waveletlm --model_args checkpoint=logs/RUN --tasks lambada_openai

takes every option of the harness's own command. A checkpoint has no token for the beginning of a text: where a task asks for
the probability of a text from its first token on, a line end stands before it.
"""

import numpy as np
import torch

from checkpoint import load_model
from config import InputError, run_command
from evaluate import score
from sampling import Reader

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    raise ImportError("lm_eval_adapter needs the package lm_eval: pip install '.[evaluation]'") from None

BEFORE_A_TEXT = "\n"
PIECE = 512  # tokens of a context that are read at a time: bounds memory, and has no bearing on the figures


@register_model("waveletlm")
class WaveletAdapter(LM):
    """The harness's requests, answered by a checkpoint. `context` is that of whole texts and of generation past block_size;
    a continuation's probability always comes from one pass with the state carried on."""

    def __init__(self, checkpoint: str, device: str = "cpu", context: str = "stream", max_new_tokens: int = 256, **_):
        super().__init__()
        if context not in ("stream", "window"):
            raise InputError(f"context: {context} must be stream or window")
        self.model, self.config, self.tokenizer = load_model(checkpoint, device)
        if self.tokenizer is None:
            raise InputError(f"checkpoint: {checkpoint} has no tokenizer beside it (tokenizer.json)")
        self.model.eval()
        self._where, self.context, self.max_new_tokens = device, context, int(max_new_tokens)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """The tokens of both together, and how many of them are the context's. Spaces between both belong to the
        continuation, whose tokens start with them."""
        spaces = len(context) - len(context.rstrip(" "))
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = self.tokenizer.encode(context or BEFORE_A_TEXT)
        return before + self.tokenizer.encode(continuation), len(before)

    @torch.inference_mode()
    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log p(continuation | context) in nats, and if it is the greedy one."""
        return [self.log_probability(*self.encode_pair(*request.args)) for request in requests]

    def log_probability(self, ids: list[int], before: int) -> tuple[float, bool]:
        """Of ids[before:] after ids[:before]; `before` is at least 1."""
        text = torch.tensor([ids], device=self._where)
        state = self.model.start(1, stream=True)
        total, greedy = 0.0, True
        for start in range(0, len(ids) - 1, PIECE):
            piece = text[:, start : min(start + PIECE, len(ids) - 1)]
            logits, state = self.model(piece, state)
            skip = max(before - 1 - start, 0)  # predictions of the context's own tokens
            if skip < piece.size(1):
                log_p = logits[0, skip:].float().log_softmax(-1)
                target = text[0, start + skip + 1 : start + piece.size(1) + 1]
                total += log_p.gather(1, target[:, None]).double().sum().item()
                greedy = greedy and bool((log_p.argmax(-1) == target).all())
        return total, greedy

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Of each text: the log probability of all its tokens, in nats."""
        block, results = self.config.block_size, []
        for request in requests:
            ids = self.tokenizer.encode(BEFORE_A_TEXT) + self.tokenizer.encode(request.args[0])
            nats = score(self.model, np.array(ids), block, max(1, block // 2), self.context, self._where)
            results.append(-nats)
        return results

    @torch.inference_mode()
    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Each context's continuation up to the first of its stop texts, which is left out."""
        return [self.continue_text(*request.args) for request in requests]

    def continue_text(self, context: str, settings: dict) -> str:
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
        reader, made = Reader(self.model, self.context), []
        text = torch.tensor([self.tokenizer.encode(context or BEFORE_A_TEXT)], device=self._where)
        logits, answer = reader.start(text), ""
        for _ in range(int(settings.get("max_gen_toks", self.max_new_tokens))):
            if temperature:
                token = torch.multinomial((logits / temperature).softmax(-1), 1)
            else:
                token = logits.argmax(-1, keepdim=True)
            made.append(token.item())
            answer = self.tokenizer.decode(made)
            found = [answer.index(stop) for stop in stops if stop and stop in answer]
            if found:
                return answer[: min(found)]
            reader.make_room(text)
            text = torch.cat([text, token], dim=1)
            logits = reader.read(token)
        return answer


if __name__ == "__main__":
    run_command(cli_evaluate)
