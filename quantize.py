"""Writes a checkpoint with quantised weights, which generate.py, evaluate.py and probes take in
the place of the run's own.

    python quantize.py --checkpoint logs/RUN --bits 8 --out logs/RUN-int8

8 bits: a scale for each output channel. 4 bits: a scale and an offset for each group of 64 inputs.
Weights lie on disk at their width, folded as the decoder reads them, so that nothing is converted
or lost when they are loaded."""

import json
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

from checkpoint import MODEL_FILE, PACKED_FORMAT, add_checkpoint_options, load_asked
from common.command import InputError, Parser, run_command
from common.files import check_regular, write_whole
from common.tensors import save_tensors
from config import Config, save_config
from data.prepare import DATA_FILE
from data.tokenizer import Tokenizer
from inference.decode import Decoder, PackedModel, head_is_embedding
from inference.weights import Bits, PackedWeights
from model import LanguageModel

COMPONENTS = {
    "mixer_coarse": "mixers of the coarse third of the scales",
    "mixer_mid": "mixers of the middle third",
    "mixer_fine": "mixers of the fine third",
    "lifting": "the wavelet's networks, both ways, and the projection after them",
    "bypass": "what the running mean of the block below goes through",
    "mlp": "the MLP",
    "memory": "values of the product-key memories, output of the associative memory",
    "query": (
        "what the memories make of their input: queries, and an associative memory's keys, values"
        " and gates"
    ),
    "embedding": "the token embedding, and the table of n-grams with its map",
    "head": "the head",
}


def quantise(
    model: LanguageModel,
    config: Config,
    tokenizer: Tokenizer | None,
    widths: Bits,
    folder: Path,
    data: bytes | None = None,
) -> int:
    """Writes `model` at `widths` to `folder`, which is new or empty, with its config, its tokenizer
    and `data`, its run's data.json if it has one: all of it or nothing. Returns the size of the
    weights' file in bytes. Raises `InputError` where it cannot be written."""
    weights = PackedWeights(widths, saving=True)
    Decoder(model, weights=weights)
    metadata = {
        "format": PACKED_FORMAT,
        "vocab_size": str(model.vocab_size),
        "bits": json.dumps(asdict(widths)),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.json")
        if tokenizer is not None:
            tokenizer.save(folder)
        if data is not None:  # by it evaluate.py reads the text as the run did
            write_whole(folder / DATA_FILE, data)
        # the last: with it the folder is a checkpoint
        save_tensors(weights.saved, folder / MODEL_FILE, metadata)
    except OSError as error:
        raise InputError(
            f"out: {folder} cannot be written ({error.strerror}); give another folder"
        ) from None
    finally:
        if not (folder / MODEL_FILE).exists():
            shutil.rmtree(folder, ignore_errors=True)
    return (folder / MODEL_FILE).stat().st_size


def build_parser() -> Parser:
    parser = Parser(__doc__.split("\n", 1)[0])
    add_checkpoint_options(parser)
    parser.add_argument(
        "--bits",
        type=int,
        required=True,
        choices=[8, 4],
        help="width of all weights but those named below",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the new checkpoint")
    group = parser.add_argument_group(
        "Bits of single components, 4, 8, 16 or 32 (default: as --bits; at 4, mixer_coarse and"
        " query are 8)"
    )
    for field in fields(Bits):
        group.add_argument(
            f"--{field.name}", type=int, choices=[4, 8, 16, 32], help=COMPONENTS[field.name]
        )
    return parser


def main() -> None:
    args = build_parser().parse_args()
    out = Path(args.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(
            f"out: {out} is there already; give a new folder, so that nothing in it is written over"
            " or hidden"
        )
    # without a tokenizer there are weights to quantise all the same
    loaded = load_asked(args.checkpoint, args.tokenizer, needs_text=False)
    if isinstance(loaded.model, PackedModel):
        raise InputError(
            f"checkpoint: {args.checkpoint} is quantised already; give the run that it was made"
            " from"
        )
    if head_is_embedding(loaded.config) and args.head is not None:
        raise InputError("head: its weight is the embedding's in this run; give --embedding")
    own = {field.name: getattr(args, field.name) for field in fields(Bits)}
    widths = replace(
        Bits.of(args.bits), **{name: bits for name, bits in own.items() if bits is not None}
    )
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    kept = loaded.folder / DATA_FILE
    check_regular(kept)
    data = kept.read_bytes() if kept.exists() else None
    size = quantise(loaded.model, loaded.config, loaded.tokenizer, widths, out, data)
    print(f"checkpoint: {out}\nbytes: {size}\nshare_of_fp32: {size / (4 * parameters):.4f}")


if __name__ == "__main__":
    run_command(main)
