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

import argparse
import json

from checkpoint import DATA_HELP, add_checkpoint_options, load_asked, say_on_stderr
from common.command import InputError, Parser, run_command
from common.device import DEVICE_HELP, chosen_device
from config import Config
from data.prepare import read_tokens
from inference.scoring import figures, score

ORIGINAL = (256, 128, "window")  # window, stride and context of the first implementation


def build_parser() -> Parser:
    parser = Parser(__doc__.split("\n", 1)[0])
    add_checkpoint_options(parser)
    parser.add_argument("--data", default="test", help=DATA_HELP)
    parser.add_argument(
        "--text_column",
        metavar="NAME",
        help="of --data in rows: the key or column of the text (default: the run's, text mostly)",
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
    parser.add_argument("--device", default="auto", metavar="DEVICE", help=DEVICE_HELP)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object in place of lines"
    )
    return parser


def read_windows(args: argparse.Namespace, config: Config) -> tuple[int, int, str]:
    """Window, stride and context. Raises `InputError` for those that cannot be."""
    if args.protocol == "original":
        if args.window or args.stride or args.context:
            raise InputError(
                "protocol: original has window 256, stride 128 and context window; leave those"
                " options out"
            )
        return ORIGINAL
    window = config.block_size if args.window is None else args.window
    stride = max(1, window // 2) if args.stride is None else args.stride
    if window < 1:
        raise InputError(f"window: {window} must be at least 1")
    if not 1 <= stride <= window:
        raise InputError(
            f"stride: {stride} must be from 1 to the window, {window}, or tokens would be left out"
        )
    return window, stride, args.context or config.eval_context


def main() -> None:
    args = build_parser().parse_args()
    device = chosen_device(args.device)
    model, config, tokenizer, folder, _ = load_asked(args.checkpoint, args.tokenizer, device)
    window, stride, context = read_windows(args, config)
    if args.text_column is not None:
        config = config.model_copy(update={"text_column": args.text_column})
    text = read_tokens(args.data, config, tokenizer, say_on_stderr, folder, args.protocol)
    nats = score(model, text.tokens, window, stride, context, device)
    protocol = "separated"
    if args.protocol == "original":
        protocol = "original"
    elif text.separator == "nothing":
        protocol = "verbatim"
    result = {"nats": nats, "tokens": len(text.tokens) - 1, "bytes": text.size, "words": text.words}
    result |= figures(nats, len(text.tokens), text.size, text.words)
    result |= {
        "protocol": protocol,
        "context": context,
        "window": window,
        "stride": stride,
        "tokenizer": tokenizer.name,
        "data": args.data,
        "text": text.source,
        "text_of_the_run": text.of_run,
        "between_documents": text.separator,
    }
    lines = [f"{key}: {value}" for key, value in result.items()]
    print(json.dumps(result) if args.json else "\n".join(lines))


if __name__ == "__main__":
    run_command(main)
