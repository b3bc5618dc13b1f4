"""Measures a checkpoint: negative log-likelihood of every token of a text but the first, in fp32.

Nothing predicts the first token, so its bytes and words don't count either: tokens, bytes and words are of what is scored.
A split is read in the run's own tokenizer and, with --protocol run, as training read it: what stands between its documents is
scored with them. --protocol verbatim has nothing between them. The result's protocol is separated, verbatim or original.

    python evaluate.py --checkpoint logs/RUN --data test

From the nats come bits per byte (comparable across tokenizers), word perplexity and token perplexity. Two contexts:
"stream" reads the text once and carries the state on, its running mean over the last block_size positions; "window" reads
windows of W tokens that start anew every R tokens, and scores of each the tokens that no window before it scored.

--protocol original is how the first implementation measured WikiText, so that its figures can be compared: window 256, stride
128, on a text with an extra blank line after every row (WikiText-103 test: 1,296,370 bytes, 287,644 GPT-2 tokens). Its figures
belong to that text and are reported under that name; they are not comparable with any others.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import chosen_device, load_model
from config import Config, InputError, Parser, run_command
from corpus import SPLITS, check_is_text, components, described, documents, read_text
from data import encode_documents, prepare_split, read_data_file, run_folder, separator, unscored, word_count
from tokenizer import Tokenizer

ORIGINAL = (256, 128, "window")  # window, stride and context of the first implementation
LOGITS_AT_A_TIME = 2**24  # 64 MB of fp32: bounds memory, and has no bearing on the figures


def _nats(model: nn.Module, ids: np.ndarray, skip: int, state, device: str):
    """The summed nats of ids (B, T + 1), of which each row's first `skip` predictions are not counted, and the state."""
    rows = torch.from_numpy(ids.astype(np.int64)).to(device)
    logits, state = model(rows[:, :-1], state)
    nats = F.cross_entropy(logits[:, skip:].float().flatten(0, 1), rows[:, 1 + skip :].flatten(), reduction="none")
    return nats.double().sum().item(), state


@torch.inference_mode()
def score(model: nn.Module, tokens: np.ndarray, window: int, stride: int, context: str, device: str = "cpu") -> float:
    """The negative log-likelihood, in nats, of tokens (n,) but the first. `stride` is of use in context "window" only."""
    if len(tokens) < 2:
        raise InputError(f"data: {len(tokens)} tokens; at least 2 are needed to predict one")
    last = len(tokens) - 1
    total = 0.0
    if context == "stream":
        state, length = model.start(1, stream=True), max(16, LOGITS_AT_A_TIME // model.vocab_size)
        for start in range(0, last, length):
            nats, state = _nats(model, tokens[None, start : min(start + length, last) + 1], 0, state, device)
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
    """Bits per byte, and perplexity per token and per word. `nats`, `size` (bytes) and `words` are those of what is scored,
    `tokens` is one more: the first token is not."""
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "token_perplexity": _exp(nats / (tokens - 1)),
        "word_perplexity": _exp(nats / max(words, 1)),
    }


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def bigram_nats(train: np.ndarray, tokens: np.ndarray, vocab_size: int) -> float:
    """Mean nats per token of a bigram model of the same tokens: the figure that any language model has to beat.

    p(b | a) = (count(a, b) + λ·p(b)) / (count(a) + λ), p(b) add-one smoothed; the λ that suits `tokens` best is taken,
    so the figure errs in the bigram's favour. At most 20 million training tokens are counted.
    """
    train = np.asarray(train[:20_000_000], np.int64)
    tokens = np.asarray(tokens, np.int64)
    pairs, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    wanted = tokens[:-1] * vocab_size + tokens[1:]
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    pair_count = np.where(pairs[place] == wanted, counts[place], 0)
    single = np.bincount(train, minlength=vocab_size)
    p_single = (single[tokens[1:]] + 1) / (len(train) + vocab_size)
    priors = [2.0**i for i in range(-2, 14)]
    return min(-np.log((pair_count + k * p_single) / (single[tokens[:-1]] + k)).mean() for k in priors)


def original_text(text: str) -> str:
    """`text` as the first implementation read it: rows with their line ends, blank ones (" \\n") empty, joined by "\\n\\n"."""
    rows = text.split("\n")
    rows = [row + "\n" for row in rows[:-1]] + rows[-1:] * bool(rows[-1])
    return "\n\n".join("" if row == " \n" else row for row in rows)


@dataclass(frozen=True)
class Text:
    """A text to score: all its tokens (n,), bytes and words of what is scored of it, and which text it is."""

    tokens: np.ndarray
    size: int
    words: int
    source: str
    separator: str = "nothing"  # between two documents
    of_run: bool | None = None  # whether it is what the run had as this split; None where nothing tells


def encoded(text: str, tokenizer: Tokenizer, source: str) -> Text:
    """One document, verbatim."""
    pieces = list(encode_documents(iter([(True, text)]), tokenizer))
    size, words = unscored(*pieces[0][1:], tokenizer) if pieces else (0, 0)
    ids = np.array([i for _, _, piece in pieces for i in piece], np.int64)
    return Text(ids, len(text.encode()) - size, word_count(text) - words, source)


def read_tokens(
    data: str, config: Config, tokenizer: Tokenizer, say: Callable, folder: Path | None = None, protocol: str = "run"
) -> Text:
    """A split of the run's own data set, or a text file; by protocol "original" its `original_text`. `folder` is the run's:
    with what it keeps of its text, protocol "run" reads a split as in training, and `say` gets a line where it is another
    text by now."""
    own = components(config)[0]  # what training mixes in has no part in the other splits
    if data in SPLITS and protocol == "original":
        source = f"{described(own)}, {data}, with the first implementation's blank lines"
        return encoded(original_text("".join(text for _, text in documents(config, data))), tokenizer, source)
    if data in SPLITS:
        kept = read_data_file(folder) if folder else None
        separate = kept is not None and kept["separated"] and protocol == "run"
        file = prepare_split(config, data, tokenizer, say, separate)
        same = None
        if kept is not None and separate == kept["separated"]:
            same = kept["splits"][data]["sha256"] == file.digest
        source = f"{described(own)}, {data}"
        if same is False:
            say(f"note: the {data} split is not the one that this run was made with, from {kept.get('source')}")
        between = separator(config, tokenizer, separate)
        return Text(file.tokens, file.scored_bytes, file.scored_words, source, between, same)
    path = Path(data)
    if not path.is_file():
        raise InputError(f"data: {data} is neither one of {', '.join(SPLITS)} nor a file")
    check_is_text(path)
    text = "".join(read_text(path))
    return encoded(original_text(text) if protocol == "original" else text, tokenizer, str(path.absolute()))


def main() -> None:
    parser = Parser(__doc__.split("\n", 1)[0])
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="run directory, .safetensors file, or an old .pt")
    parser.add_argument("--data", default="test", help="a split of the run's data, or a text file (default test)")
    parser.add_argument("--window", type=int, help="tokens in a window (default: the run's block_size)")
    parser.add_argument("--stride", type=int, help="tokens from one window to the next (default: half a window)")
    parser.add_argument("--context", choices=["stream", "window"], help="default: the run's eval_context")
    parser.add_argument(
        "--protocol",
        choices=["run", "verbatim", "original"],
        default="run",
        help="verbatim: nothing between documents; original: the first implementation's text, window and stride; "
        "run: as in training (default run)",
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto takes a GPU where there is one (default auto)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of lines")
    args = parser.parse_args()
    device = chosen_device(args.device)
    model, config, tokenizer = load_model(args.checkpoint, device)
    if tokenizer is None:
        raise InputError(f"checkpoint: {args.checkpoint} has no tokenizer beside it (tokenizer.json), so no text can be read")
    original = args.protocol == "original"
    if original and (args.window or args.stride or args.context):
        raise InputError("protocol: original has window 256, stride 128 and context window; leave those options out")
    window, stride, context = ORIGINAL if original else (args.window, args.stride, args.context or config.eval_context)
    window = config.block_size if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if window < 1:
        raise InputError(f"window: {window} must be at least 1")
    if not 1 <= stride <= window:
        raise InputError(f"stride: {stride} must be from 1 to the window, {window}, or tokens would be left out")
    folder = run_folder(args.checkpoint)
    text = read_tokens(args.data, config, tokenizer, lambda line: print(line, file=sys.stderr), folder, args.protocol)
    nats = score(model, text.tokens, window, stride, context, device)
    result = {"nats": nats, "tokens": len(text.tokens) - 1, "bytes": text.size, "words": text.words}
    result |= figures(nats, len(text.tokens), text.size, text.words)
    result |= {
        "protocol": "original" if original else "verbatim" if text.separator == "nothing" else "separated",
        "context": context,
        "window": window,
        "stride": stride,
        "tokenizer": tokenizer.name,
        "data": args.data,
        "text": text.source,
        "text_of_the_run": text.of_run,
        "between_documents": text.separator,
    }
    print(json.dumps(result) if args.json else "\n".join(f"{key}: {value}" for key, value in result.items()))


if __name__ == "__main__":
    run_command(main)
