"""Measures a checkpoint: negative log-likelihood of every token of a text but the first, in fp32.

Nothing predicts the first token, so its bytes and words don't count either: tokens, bytes and words
are of what is scored. A split is read in the run's own tokenizer and, with --protocol run, as
training read it: what stands between its documents is scored with them. --protocol verbatim has
nothing between them. The result's protocol is separated, verbatim or original.

    python evaluate.py --checkpoint logs/RUN --data test

From the nats come bits per byte (comparable across tokenizers), word perplexity and token
perplexity. Two contexts: "stream" reads the text once and carries the state on, its running mean
over the last block_size positions; "window" reads windows of W tokens that start anew every R
tokens, and scores of each the tokens that no window before it scored.

--protocol original is how the first implementation measured WikiText, so that its figures can be
compared: window 256, stride 128, on a text with an extra blank line after every row (WikiText-103
test: 1,296,370 bytes, 287,644 GPT-2 tokens). Its figures belong to that text and are reported under
that name; they are not comparable with any others."""

import json
import sys

from checkpoint import load_model
from common.command import InputError, Parser, run_command
from common.device import chosen_device
from data.prepare import read_tokens, run_folder
from inference.scoring import figures, score

ORIGINAL = (256, 128, "window")  # window, stride and context of the first implementation


def main() -> None:
    parser = Parser(__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="run directory, .safetensors file, or an old .pt",
    )
    parser.add_argument(
        "--data", default="test", help="a split of the run's data, or a text file (default test)"
    )
    parser.add_argument(
        "--window", type=int, help="tokens in a window (default: the run's block_size)"
    )
    parser.add_argument(
        "--stride", type=int, help="tokens from one window to the next (default: half a window)"
    )
    parser.add_argument(
        "--context", choices=["stream", "window"], help="default: the run's eval_context"
    )
    parser.add_argument(
        "--protocol",
        choices=["run", "verbatim", "original"],
        default="run",
        help=(
            "verbatim: nothing between documents; original: the first implementation's text, window"
            " and stride; run: as in training (default run)"
        ),
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto takes a GPU where there is one (default auto)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object in place of lines"
    )
    args = parser.parse_args()
    device = chosen_device(args.device)
    model, config, tokenizer = load_model(args.checkpoint, device)
    if tokenizer is None:
        raise InputError(
            f"checkpoint: {args.checkpoint} has no tokenizer beside it (tokenizer.json), so no text"
            " can be read"
        )
    original = args.protocol == "original"
    if original and (args.window or args.stride or args.context):
        raise InputError(
            "protocol: original has window 256, stride 128 and context window; leave those"
            " options out"
        )
    window, stride, context = (
        ORIGINAL if original else (args.window, args.stride, args.context or config.eval_context)
    )
    window = config.block_size if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if window < 1:
        raise InputError(f"window: {window} must be at least 1")
    if not 1 <= stride <= window:
        raise InputError(
            f"stride: {stride} must be from 1 to the window, {window}, or tokens would be left out"
        )
    folder = run_folder(args.checkpoint)
    text = read_tokens(
        args.data,
        config,
        tokenizer,
        lambda line: print(line, file=sys.stderr),
        folder,
        args.protocol,
    )
    nats = score(model, text.tokens, window, stride, context, device)
    result = {"nats": nats, "tokens": len(text.tokens) - 1, "bytes": text.size, "words": text.words}
    result |= figures(nats, len(text.tokens), text.size, text.words)
    result |= {
        "protocol": (
            "original" if original else "verbatim" if text.separator == "nothing" else "separated"
        ),
        "context": context,
        "window": window,
        "stride": stride,
        "tokenizer": tokenizer.name,
        "data": args.data,
        "text": text.source,
        "text_of_the_run": text.of_run,
        "between_documents": text.separator,
    }
    print(
        json.dumps(result)
        if args.json
        else "\n".join(f"{key}: {value}" for key, value in result.items())
    )


if __name__ == "__main__":
    run_command(main)
