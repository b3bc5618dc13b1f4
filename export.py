"""Writes a checkpoint as a folder that transformers loads, and that needs nothing of this
repository.

    python export.py --checkpoint logs/RUN --out exported/RUN

The folder holds weights, config and tokenizer in transformers' layout, the network's source and a
model card. Nothing is uploaded without --push."""

import argparse
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from checkpoint import Loaded, add_checkpoint_options, load_asked
from common.command import InputError, Parser, first_line, run_command
from common.files import write_whole
from common.tensors import own_tensors, save_tensors
from config import Config
from data.tokenizer import Tokenizer
from inference.decode import PackedModel
from inference.huggingface.source import network_source
from inference.sampling import sample_text
from model import LanguageModel
from training.record import read_metrics

HERE = Path(__file__).resolve().parent
CLASSES = HERE / "inference/huggingface"
CLASS_FILES = ("configuration_waveletlm.py", "modeling_waveletlm.py")
SAMPLE_TOKENS = 64  # of the card's sample: a few lines, and seconds even of a large network
NEEDS = "export.py needs the packages tokenizers and protobuf: pip install '.[export]'"

# The figures of a run's end that the card shows, if the run has them, and what it calls them.
FIGURES = {
    "val_bits_per_byte": "bits per byte, validation",
    "test_bits_per_byte": "bits per byte, test",
    "bigram_val_bits_per_byte": "the same of a bigram model, validation",
    "val_token_perplexity": "perplexity per token, validation",
    "test_token_perplexity": "perplexity per token, test",
    "training_tokens": "tokens trained on",
    "steps": "steps",
    "parameters": "parameters",
}

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- waveletlm
- custom_code
---

# {name}

A WaveletLM: a language model without attention, which mixes tokens over time by a causal wavelet. What it keeps of a text has a
fixed size, so a token costs the same at any position. {about}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"  # where this file lies, or owner/name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("{prompt}", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=100)[0]))
```

It needs torch, and transformers from 5.17 on; the network's source is `network.py`. The code is under Apache-2.0 (`LICENSE`).

## Figures
{figures}
## Sample

{sample}
"""  # noqa: E501  (Markdown's lines are as long as the other pages')


def hugging_face_config(model: LanguageModel, config: Config, end: int | None) -> dict[str, Any]:
    """What transformers' config.json is to hold. `end`: the token that ends a text, if any."""
    values = config.model_dump(mode="json")
    return {
        "model_type": "waveletlm",
        "architectures": ["WaveletLMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_waveletlm.WaveletLMConfig",
            "AutoModelForCausalLM": "modeling_waveletlm.WaveletLMForCausalLM",
        },
        "dtype": "float32",
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": config.tie_embedding_to_lm_head,
        "eos_token_id": end,
        "network": {key: values[key] for key in Config.network_keys()},
    }


def generation_config(config: Config, end: int | None, filler: int) -> dict[str, Any]:
    """How generate.py chooses a token of this run, in transformers' words. `end`: as above.
    `filler`: the token that stands where there is no text."""
    values: dict[str, Any] = {"repetition_penalty": config.repetition_penalty}
    values["do_sample"] = config.temperature > 0
    if config.temperature > 0:
        values |= {"temperature": config.temperature, "top_p": config.top_p}
        values["top_k"] = 0  # transformers' own default leaves 50 tokens
    return values | {"eos_token_id": end, "pad_token_id": filler}


def fenced(text: str) -> str:
    """`text` as Markdown shows it as it stands, whatever backticks are in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def card(name: str, run: Path, model: LanguageModel, config: Config, tokenizer: Tokenizer) -> str:
    """The model card. Its figures are those of the run's end; a run without one has none."""
    results = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "result"]
    result = results[-1] if results else {}
    rows = [
        f"| {words} | {value:,} |" if isinstance(value, int) else f"| {words} | {value:.4f} |"
        for key, words in FIGURES.items()
        if isinstance(value := result.get(key), int | float)
    ]
    context = result.get("context")
    figures = "\nThe run did not come to its end, so there are none.\n"
    if rows:
        figures = (
            f"\nOn data set `{Path(config.dataset).name}`, context `{context}`:\n\n"
            "| | |\n|---|---|\n" + "\n".join(rows) + "\n"
        )
    count = sum(p.numel() for p in model.parameters())
    return CARD.format(
        name=name,
        about=f"This one has {count:,} parameters and knows {model.vocab_size:,} tokens.",
        prompt=json.dumps(config.generation_prompt, ensure_ascii=False)[1:-1],
        figures=figures,
        sample=fenced(sample_text(model, tokenizer, config, SAMPLE_TOKENS)),
    )


def write_folder(folder: Path, name: str, loaded: Loaded) -> None:
    """Fills `folder`, which is there and empty; `name` is what its card calls it."""
    model, config, tokenizer = loaded.model, loaded.config, loaded.tokenizer
    try:
        from inference.huggingface.tokenizer import filler_token, tokenizer_files

        texts = tokenizer_files(tokenizer)
    except ImportError as error:
        raise InputError(f"{NEEDS} ({error})") from None
    end = tokenizer.end_of_text
    texts["config.json"] = json.dumps(hugging_face_config(model, config, end), indent=2)
    choosing = generation_config(config, end, filler_token(tokenizer))
    texts["generation_config.json"] = json.dumps(choosing, indent=2)
    texts["network.py"] = network_source()
    for file in CLASS_FILES:
        texts[file] = (CLASSES / file).read_text(encoding="utf-8")
    texts["LICENSE"] = (HERE / "LICENSE").read_text(encoding="utf-8")
    texts["README.md"] = card(name, loaded.folder, model, config, tokenizer)
    for file, text in texts.items():
        write_whole(folder / file, text.encode())
    tensors = {f"network.{name}": tensor for name, tensor in own_tensors(model).items()}
    save_tensors(tensors, folder / "model.safetensors", {"format": "pt"})


def export(checkpoint: str, out: Path, tokenizer: str = "") -> None:
    """Writes `out`, which is new or empty, from what --checkpoint and --tokenizer ask for: all of
    it or nothing. Raises `InputError` for what cannot be exported."""
    loaded = load_asked(checkpoint, tokenizer)
    if isinstance(loaded.model, PackedModel):
        raise InputError(
            f"checkpoint: {checkpoint} is quantised, in a layout of our own; give the run that it"
            " was made from"
        )
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir(parents=True)
        write_folder(beside, out.name, loaded)
        os.replace(beside, out)
    except OSError as error:
        raise InputError(f"out: {out} cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_name(name: str) -> None:
    """Raises `InputError` unless `name` is one that the hub gives to a model."""
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name, re.ASCII):
        raise InputError(f"push: {name} is no name on the hub; give owner/name")


def push(folder: Path, name: str) -> str:
    """Uploads `folder` as the model `name`, which is made, for its owner's eyes alone, if it is not
    there. Returns its address. Raises `InputError` where the hub cannot be reached or refuses."""
    from huggingface_hub import HfApi  # imported late: few runs of this command need it

    hub = HfApi()
    try:
        hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of a WaveletLM")
    except Exception as error:
        # Its errors are those of whatever HTTP library it has, another one from version to version.
        raise InputError(
            f"push: {name} cannot be uploaded ({first_line(error)}); {folder} is whole: hf upload"
            f" {name} {folder} sends it when that is mended"
        ) from None
    return f"https://huggingface.co/{name}"


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_options(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="the new folder")
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload the folder to the Hugging Face hub, as a private model unless it is there"
        " (needs a login: hf auth login)",
    )
    return parser


def main() -> None:
    args = build_parser().parse_args()
    out = Path(args.out).resolve()  # "." too has a name then
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"out: {out} is there already and not empty; give a new folder")
    if args.push is not None:
        check_name(args.push)
    export(args.checkpoint, out, args.tokenizer)
    print(f"exported: {args.out}")
    if args.push is not None:
        print(f"pushed: {push(out, args.push)}")


if __name__ == "__main__":
    run_command(main)
