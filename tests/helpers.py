"""What several test files need: a tiny config with every released feature on, random weights."""

import json
import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing import Process
from pathlib import Path
from typing import Any

import pytest
import torch

import train as train_module
from checkpoint import save_model
from common.command import run_command
from config import Config, make_config, save_config
from data.prepare import prepare
from data.tokenizer import ByteTokenizer
from layers.features import FeatureEmbedding
from model import build_model
from training.distributed import World
from training.record import Record
from training.trainer import Trainer

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
VOCAB = 50

# The released feature set at a size that runs in milliseconds. Dropouts are 0, so that results
# repeat.
TINY = {
    "C": 16, "layers": 2, "levels": 3, "block_size": 32, "mlp_expansion": 2, "low_rank": 2,
    "pkm_num_keys": 16, "pkm_top_k": 4, "fwpkm_num_keys": 16, "fwpkm_top_k": 4,
    "fwpkm_chunk_size": 8,
    "multinodal_cell_dim": 16,
    **{f"dropout_{place}": 0.0 for place in ("embedding", "projection", "mixer", "mlp", "lm_head")},
}  # fmt: skip


def tiny(**overrides: Any) -> Config:
    """A config for tests. Mixer widths follow `levels`: full at the coarse half of the scales, half
    at the fine one."""
    values = TINY | overrides
    scales = values["levels"] + 1
    values.setdefault(
        "per_scale_mixer_widths", (1.0,) * (scales // 2) + (0.5,) * (scales - scales // 2)
    )
    return make_config(values, "tiny")


def new_model(config: Config) -> torch.nn.Module:
    """A network as it begins. Where it has token features they are random: there is no tokenizer to
    take them from."""
    model = build_model(config, VOCAB)
    for module in model.modules():
        if isinstance(module, FeatureEmbedding):
            module.basis.normal_(generator=torch.Generator().manual_seed(0))
    return model


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Moves every parameter away from its initial value, so that zero-initialised gains count and
    no matrix is special.

    Logits that a softmax blends (bases, lags) are drawn anew: at their initial 10 and 5 one choice
    hides all others."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("basis_weights", "dilation_logits")):
                parameter.copy_(noise)
            elif parameter.dim() >= 2 and not name.endswith("history_gains"):
                parameter.add_(0.4 * noise / parameter.size(-1) ** 0.5)
            else:
                parameter.add_(0.2 * noise)
    return model


def random_model(config: Config, seed: int = 0) -> torch.nn.Module:
    """A network with randomised weights, in eval mode."""
    torch.manual_seed(seed)
    return randomised(new_model(config), seed).eval()


def random_ids(rows: int = 2, length: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def run_in_chunks(model: torch.nn.Module, ids: torch.Tensor, lengths, state=None):
    """The logits of `ids`, given to the model in pieces of `lengths` with the state handed on, and
    the last state."""
    logits = []
    for piece in ids.split(list(lengths), dim=1):
        part, state = model(piece, state)
        logits.append(part)
    return torch.cat(logits, dim=1), state


def save_byte_run(config: Config, folder: Path) -> Path:
    """Fills `folder` with a run of a randomised network over bytes, as train.py leaves it for other
    commands; returns it."""
    torch.manual_seed(0)
    save_model(randomised(build_model(config, 256)), folder / "best_model.safetensors")
    save_config(config, folder / "config.json")
    ByteTokenizer().save(folder)
    return folder


SMALL = {
    "C": 16, "layers": 2, "levels": 3, "mlp_expansion": 2, "per_scale_mixer_widths": None,
    "block_size": 16, "pkm_num_keys": 16,
    "pkm_top_k": 4, "fwpkm_num_keys": 16, "fwpkm_top_k": 4, "micro_batch_size": 4, "compile": False,
    "use_amp": False,
    "tokenizer": "bytes", "max_steps": 12, "eval_interval": 4, "save_interval": 4,
    "eval_tokens": 256, "log_interval": 1,
    "sample_tokens": 8, "num_new_tokens": 8, "generation_prompt": "The ", "warmup_fraction": 0.25,
    "device": "cpu",
}  # fmt: skip


def write_text(folder: Path) -> Path:
    """A file of a few thousand words with some regularity in it; returns its path."""
    lines = [
        f"The {i} bears of valley {i % 7} met the fox, who owed them {i * i % 13} pears.\n"
        for i in range(300)
    ]
    (folder / "tale.txt").write_text("".join(lines), encoding="utf-8")
    return folder / "tale.txt"


def write_settings(folder: Path, **overrides: Any) -> Path:
    """A config of `SMALL` for train.py, with the text and all that a run makes in `folder`; returns
    its path."""
    values = SMALL | {
        "dataset": str(folder / "tale.txt"),
        "out_dir": str(folder / "logs"),
        "cache_dir": str(folder / "cache"),
    }
    (folder / "config.json").write_text(json.dumps(values | overrides), encoding="utf-8")
    return folder / "config.json"


def run(monkeypatch, *arguments):
    """Runs train.py's main here, with these arguments."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    train_module.main()


def start_child(work: Callable[[], None]) -> Process:
    """Starts `work()` in a child. It is forked from this process, since a new one would take
    seconds to import what this one has. A negative exit code is a signal's."""
    child = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    child.start()
    return child


def skip_without_forked_training() -> None:
    """Skips a test whose child trains where a forked one may not: in torch's builds for CUDA, whose
    gradients have threads, once this process has computed one."""
    if torch.backends.cuda.is_built():
        pytest.skip("a child forked from torch's build for CUDA cannot compute gradients")


def run_in_child(*arguments, prepare: Callable[[], None] = lambda: None) -> Process:
    """Starts train.py in a child, after `prepare()` there."""
    skip_without_forked_training()

    def work():
        sys.argv = ["train.py", *map(str, arguments)]
        prepare()
        run_command(train_module.main)

    return start_child(work)


def only_run(tmp_path):
    (folder,) = (tmp_path / "logs").iterdir()
    return folder


NO_DROPOUT = dict.fromkeys((k for k in Config.model_fields if k.startswith("dropout_")), 0.0)


def new_trainer(config: Config, place: Path, device: str) -> Trainer:
    """A trainer of `config` before its first step, whose run's folder is `place`/run."""
    (place / "run").mkdir(exist_ok=True)
    record = Record(place / "run", quiet=True)
    return Trainer(config, record, prepare(config, lambda line: None), World(device))
