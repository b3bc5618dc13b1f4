"""Continues a prompt with a trained model.

    python generate.py --checkpoint logs/RUN --prompt "The history of" --num_tokens 200

Text goes to stdout as it is made; figures go to stderr as `key: value`; samples are appended to the
run's generations.txt."""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint import Loaded, add_checkpoint_options, load_asked
from common import gpu
from common.command import InputError, Parser, first_line, run_command
from common.device import DEVICE_HELP, chosen_device
from common.files import check_regular, read_utf8
from config import Config
from data.tokenizer import Tokenizer
from inference import cpu_kernels
from inference.decode import Decoder, PackedModel
from inference.endings import Ending, Endings, ended_text
from inference.graphs import can_be_captured, graphed
from inference.sampling import Settings, bare_prompt, generate, measure, settings_of
from inference.spacing import _clean_line, clean_spacing
from model import FastWeightMemory

GENERATIONS_FILE = "generations.txt"
STRATEGIES = {
    "top_p": 0.85,
    "repetition_penalty": 1.2,
    "entropy_adaptive": True,
    "metrics": True,
    "clean_spacing": True,
}
STRATEGIES_TEMPERATURE = 0.9  # the highest under --strategies


class Printer:
    """Prints text as it comes, in whole characters, up to where it ends; with `clean`, in whole
    lines, whose quotes are paired."""

    def __init__(self, ending: Ending, clean: bool):
        self.ending = ending
        self.clean = clean
        self.line = ""  # with `clean`: what has no line end yet

    def text(self, text: str) -> None:
        if self.clean:
            *whole, self.line = (self.line + text).split("\n")
            text = "".join(f"{_clean_line(line)}\n" for line in whole)
        if text:
            print(text, end="", flush=True)

    def token(self, token: int) -> None:
        self.text(self.ending.push(token))

    def end(self) -> None:
        self.text(self.ending.flush())
        print(_clean_line(self.line) if self.clean else "", flush=True)


# ===== The command's options


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_options(parser)
    add_choice_options(parser)
    add_strategy_options(parser)
    add_output_options(parser)
    return parser


GIVEN = "(default: the checkpoint's %s)"


def add_text_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Text")
    add = group.add_argument
    add_checkpoint_options(group)
    add(
        "--prompt",
        metavar="TEXT",
        help="text to go on from, without spaces at its end; - is all that stdin has "
        + GIVEN % "generation_prompt",
    )
    add(
        "--prompt_file",
        metavar="FILE",
        help="the same from a file in UTF-8; of a file and of stdin the last line end is left out",
    )
    add(
        "--interactive",
        action="store_true",
        help="read a prompt per line from stdin until it ends, and continue each",
    )
    add(
        "--num_tokens",
        type=int,
        metavar="N",
        help="most tokens to generate " + GIVEN % "num_new_tokens",
    )
    add("--stop", action="append", default=[], metavar="TEXT", help=STOP_HELP)
    add(
        "--n",
        type=int,
        default=1,
        help="samples, in one batch; several are printed when all are done (default 1)",
    )
    add(
        "--seed",
        type=int,
        default=1337,
        help="the same seed gives the same text, whatever the batch (default 1337)",
    )


def add_choice_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Choosing a token").add_argument
    add(
        "--temperature",
        type=float,
        metavar="T",
        help="divides the logits; 0 = most probable token " + GIVEN % "temperature",
    )
    add(
        "--top_k",
        type=int,
        default=0,
        metavar="N",
        help="draw from the N most probable tokens; 0 = from all (default 0)",
    )
    add(
        "--top_p",
        type=float,
        metavar="P",
        help="nucleus: the smallest set of this probability, of those that top_k leaves "
        + GIVEN % "top_p",
    )
    add(
        "--min_p",
        type=float,
        default=0.0,
        metavar="P",
        help="leave out tokens below P times the highest probability; 0 = none (default 0)",
    )
    add(
        "--repetition_penalty",
        type=float,
        metavar="R",
        help="divides positive and multiplies negative logits of tokens in the text so far "
        + GIVEN % "repetition_penalty",
    )
    add("--context", choices=["stream", "window"], help=CONTEXT_HELP)


def add_strategy_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Strategies").add_argument
    add("--strategies", action="store_true", help=STRATEGIES_HELP)
    add("--entropy_adaptive", action="store_true", help=ADAPTIVE_HELP)
    add(
        "--min_temperature",
        type=float,
        default=0.5,
        metavar="T",
        help="T_min of --entropy_adaptive (default 0.5)",
    )
    add("--lookahead_k", type=int, default=1, metavar="K", help=LOOKAHEAD_HELP)
    add(
        "--lookahead_depth",
        type=int,
        default=4,
        metavar="D",
        help="tokens of each candidate's greedy text (default 4)",
    )
    add("--best_of_n", type=int, default=1, metavar="N", help=BEST_HELP)
    add("--wavelet_coherence", action="store_true", help=COHERENCE_HELP)
    add(
        "--fwpkm_inference_updates",
        action="store_true",
        help="let the text rewrite the fast-weight memory as it goes",
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Output and speed").add_argument
    add(
        "--clean_spacing",
        action="store_true",
        help="undo WikiText's spacing of punctuation, quotes and contractions",
    )
    add(
        "--metrics",
        action="store_true",
        help="mean log-probability, entropy, Distinct-1/2/3 and Rep-4, on stderr",
    )
    width = parser.add_mutually_exclusive_group()
    width.add_argument("--bits", type=int, choices=[32, 16, 8, 4], help=BITS_HELP)
    width.add_argument(
        "--ptq8", action="store_const", dest="bits", const=8, help="the same as --bits 8"
    )
    width.add_argument(
        "--ptq4", action="store_const", dest="bits", const=4, help="the same as --bits 4"
    )
    add("--compile", action="store_true", help=COMPILE_HELP)
    add("--device", default="auto", metavar="DEVICE", help=DEVICE_HELP)


STOP_HELP = (
    "end a text where TEXT comes, which is not printed; may be given several times. A text also"
    " ends at the tokenizer's end of text, where it has one"
)
BITS_HELP = (
    "width of the weights: 32 = fp32, 16 = bf16, 8 or 4 = quantised while loading (default: as they"
    " lie in the checkpoint on a CPU, 16 on a GPU, where the time for a token is that of reading"
    " the weights)"
)
COMPILE_HELP = (
    "compile the step of one token with torch.compile: up to a minute at first, then more tokens"
    " per second on a GPU; on a CPU only where there are no kernels of our own, beside which it is"
    " slower"
)
CONTEXT_HELP = (
    "past block_size: stream carries the state on, its mean over the last block_size tokens; window"
    " rebuilds it from the last block_size/2 tokens whenever block_size is reached (default: the"
    " checkpoint's eval_context)"
)
STRATEGIES_HELP = (
    "--entropy_adaptive with at most temperature 0.9, --top_p 0.85, --repetition_penalty 1.2,"
    " --metrics, --clean_spacing; a value given beside it counts"
)
ADAPTIVE_HELP = (
    "temperature T_max - H/ln V * (T_max - T_min), H the entropy of the model's softmax, T_max the"
    " --temperature: careful where the model is unsure"
)
LOOKAHEAD_HELP = (
    "try the K most probable tokens of the nucleus, each followed by a greedy text of"
    " --lookahead_depth tokens, and take the one whose whole text is most probable; chance has no"
    " part in it (default 1: no lookahead)"
)
BEST_HELP = (
    "make N texts for each sample and keep the one whose mean log-probability is highest"
    " (default 1)"
)
COHERENCE_HELP = (
    "every 16 tokens compare the mean Haar approximation of the prompt's embeddings with that of"
    " the last 128 tokens; where their cosine c is under 0.5, top_p is multiplied by max(0.5,"
    " c/0.5)"
)


# ===== What the options ask for


def read_settings(args: argparse.Namespace, config: Config) -> Settings:
    """What the command line says, over what --strategies says, over what the checkpoint's config
    says."""
    settings = settings_of(config)
    if args.strategies:
        temperature = args.temperature if args.temperature is not None else settings.temperature
        args.temperature = min(temperature, STRATEGIES_TEMPERATURE)
        for name, value in STRATEGIES.items():
            # neither given nor switched on
            if getattr(args, name) is None or getattr(args, name) is False:
                setattr(args, name, value)
    given = {field.name: getattr(args, field.name) for field in fields(Settings)}
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


def allow_writes(model: nn.Module) -> None:
    """Switches fwpkm_inference_updates on."""
    if isinstance(model, PackedModel):
        raise InputError(
            "fwpkm_inference_updates: this checkpoint's memory is quantised; give the run that it"
            " was made from"
        )
    memories = [module for module in model.modules() if isinstance(module, FastWeightMemory)]
    if not memories:
        raise InputError(
            "fwpkm_inference_updates: this checkpoint has no fast-weight memory (its fwpkm_enabled"
            " is false)"
        )
    for memory in memories:
        memory.writes = True


def build_decoder(model: nn.Module, bits: int | None) -> Decoder:
    """What reads the text: the network prepared for inference with weights of `bits` bits; None =
    as `BITS_HELP` says."""
    if isinstance(model, PackedModel):
        if bits is not None:
            raise InputError(
                f"bits: {bits} (--ptq{bits}): this checkpoint is quantised already; leave the"
                " option out"
            )
        return model.decoder
    if bits is None and next(model.parameters()).device.type == "cuda":
        bits = 16
    return Decoder(model, bits)


def compile_step(decoder: Decoder, settings: Settings) -> None:
    """Compiles the step of as many rows as are read at once: the texts', or the lookahead's."""
    began = time.perf_counter()
    rows = settings.rows * min(settings.lookahead_k, decoder.vocab_size)
    stream = settings.context == "stream"
    try:
        if decoder.device.type == "cuda" and can_be_captured(decoder):
            decoder.compiles_graphs = True
            graphed(decoder, rows, stream)
        else:
            decoder.compile(rows, stream)
    except (RuntimeError, OSError, ImportError) as error:  # no C++ compiler, say
        raise InputError(
            f"compile: torch cannot compile here, so leave the option out ({first_line(error)})"
        ) from None
    say_figures({"seconds_to_compile": time.perf_counter() - began})


def say_what_is_slower(decoder: Decoder) -> None:
    """What the device is not used for that it could be."""
    missing = {"cpu": cpu_kernels.missing, "cuda": gpu.missing}.get(decoder.device.type)
    if missing and (reason := missing()):
        print(f"note: weights are multiplied by torch's own kernels: {reason}", file=sys.stderr)
    if decoder.device.type != "cuda":
        return
    if not can_be_captured(decoder):
        print(
            "note: a memory that writes is no part of a CUDA graph, so steps are launched one"
            " by one",
            file=sys.stderr,
        )


def check_options(args: argparse.Namespace) -> None:
    """Raises `InputError` for what options say that no checkpoint could do."""
    given = [args.prompt is not None, args.prompt_file is not None, args.interactive]
    if sum(given) > 1:
        raise InputError(
            "prompt: comes from --prompt, from --prompt_file or, with --interactive, line by line"
            " from stdin; give one of the three"
        )
    if args.num_tokens is not None and args.num_tokens < 0:
        raise InputError(f"num_tokens: {args.num_tokens} is out of range; it must be 0 or more")
    if "" in args.stop:
        raise InputError("stop: a text of no characters is everywhere; give some")


def read_prompts(args: argparse.Namespace, config: Config) -> Iterator[str]:
    """The one prompt, or with --interactive each line of stdin that has any text."""
    if not args.interactive:
        yield read_prompt(args, config)
        return
    print("> ", end="", file=sys.stderr, flush=True)
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\r\n")
        print("> ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def read_prompt(args: argparse.Namespace, config: Config) -> str:
    """The prompt of the options, or the checkpoint's own. An editor and `echo` end every text with
    a line end, so the last one is no part of it."""
    if args.prompt_file is not None:
        text = read_utf8(Path(args.prompt_file))
    elif args.prompt == "-":
        text = sys.stdin.read()
    else:
        return config.generation_prompt if args.prompt is None else args.prompt
    return text.removesuffix("\n").removesuffix("\r")


def encode_prompt(prompt: str, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("prompt: is not valid UTF-8; give it in UTF-8") from None
    ids = tokenizer.encode(prompt)
    if not ids:
        raise InputError("prompt: has no tokens; give some text to go on from")
    if max(ids) >= vocab_size:
        raise InputError(
            f"prompt: token {max(ids)} of {tokenizer.name} is beyond the model's {vocab_size}; they"
            " do not match"
        )
    return ids


# ===== Writing text


def say_figures(values: dict[str, float]) -> None:
    for key, value in values.items():
        print(f"{key}: {value:.4f}", file=sys.stderr)


def speed(seconds: list[float], start: float, rows: int) -> dict[str, float]:
    """Time to the first token, and tokens per second from the third on: the second may compile or
    pack the step."""
    values = {"seconds_to_first_token": seconds[0] - start} if seconds else {}
    if len(seconds) > 2:
        values["tokens_per_second"] = rows * (len(seconds) - 2) / (seconds[-1] - seconds[1])
    return values


def keep_samples(folder: Path, settings: Settings, texts: list[str], more: str) -> None:
    """Appends texts and what made them to the run's generations.txt."""
    values = " ".join(f"{field.name}={getattr(settings, field.name)}" for field in fields(settings))
    entry = f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {more} {values}\n"
    for i, text in enumerate(texts):
        entry += f"{heading(i, len(texts))}{text}\n\n"
    path = folder / GENERATIONS_FILE
    try:
        check_regular(path)  # a FIFO would be waited for
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(entry)
    except (OSError, InputError) as error:
        reason = (
            f"{path}: cannot be written ({error.strerror})" if isinstance(error, OSError) else error
        )
        print(f"note: {reason}; text is printed only", file=sys.stderr)


def heading(i: int, n: int) -> str:
    return f"--- sample {i + 1} of {n}\n" if n > 1 else ""


@dataclass
class Session:
    """A decoder with all that it takes to continue prompts."""

    decoder: Any  # a Decoder
    tokenizer: Tokenizer
    settings: Settings
    num_tokens: int
    stops: list[str]
    vocab_size: int
    device: str
    embedding: Tensor | None  # (V, C), for wavelet_coherence
    clean: bool
    metrics: bool

    def continue_prompt(self, prompt: str, keep: Callable[[list[str]], None]) -> None:
        """Generates, prints and measures, and gives the texts to `keep`. A single text is printed
        as it comes; several, or the best of several, when they are done and kept. Of what is
        stopped on the way, by Ctrl-C say, all that was made by then is kept."""
        prompt = self.checked(prompt)
        ids = torch.tensor(
            [encode_prompt(prompt, self.tokenizer, self.vocab_size)],
            dtype=torch.int64,
            device=self.device,
        )
        rows = self.settings.rows
        endings = Endings(self.tokenizer, rows, self.stops)
        printer = None
        if rows == 1:
            printer = Printer(Ending(self.tokenizer, self.stops), self.clean)
        moments: list[float] = []
        made: list[Tensor] = []  # each step's tokens, of all texts

        def on_token(tokens: Tensor) -> None:
            made.append(tokens)
            if printer is not None:
                printer.token(int(tokens[0]))
            moments.append(time.perf_counter())

        start = time.perf_counter()
        try:
            if printer is not None:
                printer.text(prompt)
            sample = generate(
                self.decoder, ids, self.num_tokens, self.settings, on_token, self.embedding, endings
            )
        except (KeyboardInterrupt, BrokenPipeError):
            if made:
                keep(self.texts(prompt, torch.stack(made, dim=1)))
            with contextlib.suppress(BrokenPipeError):
                print(flush=True)  # what is said next begins a line
            raise
        texts = self.texts(prompt, sample.ids[:, ids.size(1) :])
        keep(texts)
        if printer is not None:
            printer.end()
        else:
            for i, text in enumerate(texts):
                print(f"{heading(i, len(texts))}{text}", flush=True)
        if self.metrics and self.num_tokens:
            say_figures(measure(sample, ids.size(1)))
        say_figures(speed(moments, start, rows))

    def checked(self, prompt: str) -> str:
        """The prompt as it is read; says so where that is not as it was given."""
        bare = bare_prompt(prompt, self.tokenizer)
        if bare != prompt:
            print(
                "note: spaces at the prompt's end are left out, for tokens begin with their space",
                file=sys.stderr,
            )
        return bare

    def texts(self, prompt: str, tokens: Tensor) -> list[str]:
        """The prompt and what follows it, of each row of tokens (n, N)."""
        texts = [prompt + ended_text(row, self.tokenizer, self.stops) for row in tokens.tolist()]
        return [clean_spacing(text) for text in texts] if self.clean else texts


def new_session(loaded: Loaded, args: argparse.Namespace, device: str) -> Session:
    """All that the options ask for, of a checkpoint that is loaded."""
    model = loaded.model
    config = loaded.config
    settings = read_settings(args, config)
    if settings.lookahead_k > 1 and settings.rows > 1:
        print(
            "note: chance has no part in lookahead, so all samples will be the same",
            file=sys.stderr,
        )
    if args.fwpkm_inference_updates:
        allow_writes(model)
    decoder = build_decoder(model, args.bits)
    say_what_is_slower(decoder)
    if args.compile:
        compile_step(decoder, settings)
    embedding = None
    if settings.wavelet_coherence:
        embedding = decoder.cells[0].embedding(torch.arange(model.vocab_size, device=device))
    return Session(
        decoder,
        loaded.tokenizer,
        settings,
        config.num_new_tokens if args.num_tokens is None else args.num_tokens,
        args.stop,
        model.vocab_size,
        device,
        embedding,
        args.clean_spacing,
        args.metrics,
    )


def main() -> None:
    args = build_parser().parse_args()
    check_options(args)
    device = chosen_device(args.device)
    loaded = load_asked(args.checkpoint, args.tokenizer, device)
    session = new_session(loaded, args, device)
    config = loaded.config
    folder = loaded.own_folder
    del loaded  # what the decoder has packed is not needed twice

    def keep(texts: list[str]) -> None:
        # of a file of the hub the folder is a cache
        if folder is not None:
            more = f"num_tokens={session.num_tokens} bits={args.bits}"
            keep_samples(folder, session.settings, texts, more)

    for prompt in read_prompts(args, config):
        session.continue_prompt(prompt, keep)


if __name__ == "__main__":
    run_command(main)
