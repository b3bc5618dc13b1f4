"""What export.py writes: in a process that knows nothing of the repository it gives the same
logits, tokens and texts as here."""

import json
import os
import random
import shutil
import subprocess
import sys
import types
from pathlib import Path

import filelock
import huggingface_hub
import pytest
import sentencepiece
import torch
from cases import CASES, network
from helpers import ROOT, SHARED, VOCAB, random_ids, randomised, save_byte_run, tiny

import export
from checkpoint import MODEL_FILE, load_model, save_model
from common.command import InputError
from config import Config, save_config
from data.tokenizer import ByteTokenizer, GPT2Tokenizer, SentencePieceTokenizer, train_sentencepiece
from inference.decode import Decoder
from inference.huggingface.source import network_source
from inference.sampling import Settings, generate
from layers.features import fill_features
from model import build_model
from quantize import main as quantize

NEW = 24  # as in exported_folder.py
NETWORKS = {
    "best": {  # the first, which is looked at in detail
        "wavelet_mode": "haar", "per_scale_mixer_widths": (0.5, 0.5, 0.25, 0.25),
        "decompose_bypass": False, "tie_embedding_to_lm_head": True, "token_features": True,
        "ngram_slots": 11, "ngram_width": 6, "recall_heads": 2, "recall_dim": 4,
        "pkm_enabled": False, "fwpkm_enabled": False,
    },
    "released": {},
    "packets": {
        "wavelet_mode": "packets", "per_scale_mixer_widths": None, "mixer_depth": 2,
        "decompose_bypass_ema": True, "loop_iterations": 2,
    },
    "bases": {
        "multi_basis_lifting": True, "untied_reconstruction": True, "exp_parametrization": True,
        "looped_blocks": True, "looped_blocks_count": 2,
        "fwpkm_inference_updates": True, "fwpkm_chunk_size": 5, "fwpkm_update_lr": 0.5,
    },
    "cells": {
        "multinodal_enabled": True, "multinodal_cross_cell_gating": True,
        "tie_embedding_to_lm_head": True, "ngram_slots": 11, "ngram_width": 6,
    },
}  # fmt: skip
MERGES = Path(os.environ.get("TIKTOKEN_CACHE_DIR", SHARED / "tiktoken"))  # GPT-2's
TEXTS = [
    "", " ", "   leading and   several spaces", "two lines\n\n and\tmore\r\n",
    "émoji 🙂👩‍👩‍👧 中文",
    "▁ and▁▁ ▁\n▁", "<unk></s><|endoftext|><0x41>\0", "def f(x):\n        return '''it's'''\n",
]  # fmt: skip
IDS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(1))
LONGER = torch.randint(256, (2, 75), generator=torch.Generator().manual_seed(2))
ALPHABET = " \n\ta▁é🙂中e.,thin'<0x>"


def run_of(folder: Path, config: Config, tokenizer) -> Path:
    """A run's folder, with a randomised network over the tokenizer's tokens."""
    folder.mkdir()
    torch.manual_seed(0)
    model = randomised(build_model(config, tokenizer.vocab_size))
    fill_features(model, tokenizer)
    save_model(model, folder / MODEL_FILE)
    save_config(config, folder / "config.json")
    tokenizer.save(folder)
    return folder


def tokenizers() -> dict:
    """One of each kind that can be had here."""
    pages = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    source = (ROOT / "model.py").read_text(encoding="utf-8")  # for indentation
    known = {
        "bytes": ByteTokenizer(),
        "sentencepiece": SentencePieceTokenizer(train_sentencepiece(iter([*pages, source]), 1200)),
    }
    if MERGES.is_dir():
        known["gpt2"] = GPT2Tokenizer()
    return known


def texts() -> list[str]:
    """Awkward ones, and random ones made of awkward characters."""
    draw = random.Random(0)
    return TEXTS + ["".join(draw.choices(ALPHABET, k=30)) for _ in range(100)]


def export_all(place: Path) -> None:
    """Makes a run of each network and each tokenizer in `place`, exports them, and has
    exported_folder.py save what they give, away from the repository and without any hub."""
    for name, options in NETWORKS.items():
        run = run_of(place / f"run {name}", tiny(**options), ByteTokenizer())
        export.export(str(run), place / name)
    kinds = tokenizers()
    for name, tokenizer in kinds.items():
        export.export(str(run_of(place / f"run {name}", tiny(layers=1), tokenizer)), place / name)
    asked = {
        "networks": {str(place / name): {"ids": IDS, "long ids": LONGER} for name in NETWORKS},
        "tokenizers": {str(place / name): texts() for name in kinds},
    }
    torch.save(asked, place / "asked.pt")
    known = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "cache")}
    # a copy, since a script's own folder is where Python looks for modules first
    script = shutil.copy(Path(__file__).with_name("exported_folder.py"), place)
    command = [sys.executable, script, place / "asked.pt", place / "given.pt"]
    done = subprocess.run(command, cwd=place, env=known, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module", autouse=True)
def little_is_done():
    """Cards get a sample of two tokens, and GPT-2's merges come from a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(MERGES))
        patch.setattr(export, "SAMPLE_TOKENS", 2)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, worker_id) -> types.SimpleNamespace:
    """The models and tokenizers that were exported, and what the other process gave for them. It
    takes seconds, so of several workers the first does it for all."""
    pytest.importorskip("transformers", reason="the extra 'export' is not installed")
    pytest.importorskip("google.protobuf", reason="the extra 'export' is not installed")
    base = tmp_path_factory.getbasetemp()
    place = (base if worker_id == "master" else base.parent) / "exports"
    with filelock.FileLock(f"{place}.lock"):
        if not (place / "given.pt").is_file():
            place.mkdir()
            export_all(place)
    own = types.SimpleNamespace(models={}, tokenizers={}, place=place)
    for run in place.glob("run *"):
        name = run.name.removeprefix("run ")
        own.models[name], _, own.tokenizers[name] = load_model(run)
    own.given = torch.load(place / "given.pt", weights_only=True)
    return own


@pytest.fixture
def detail(made):
    """All that the folder of the first network gave."""
    return made.given[str(made.place / "best")] | made.given["in detail"]


@pytest.fixture(params=NETWORKS)
def pair(request, made):
    """A network of ours, and what its folder gave."""
    return made.models[request.param], made.given[str(made.place / request.param)]


def greedy(model, ids: torch.Tensor, penalty: float) -> torch.Tensor:
    settings = Settings(temperature=0.0, repetition_penalty=penalty)
    return generate(model, ids, NEW, settings).ids


@torch.no_grad()
def test_a_folder_gives_the_logits_of_its_checkpoint(pair):
    model, given = pair
    torch.testing.assert_close(given["logits"], model(IDS)[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_past_block_size_it_gives_those_of_a_stream(pair):
    model, given = pair
    logits, _ = model(LONGER, model.start(2, stream=True))
    torch.testing.assert_close(given["long logits"], logits, rtol=0, atol=1e-5)


def test_generate_gives_the_tokens_of_our_greedy_decoding(pair):
    model, given = pair
    assert torch.equal(given["greedy"], greedy(model, IDS, 1.0))


def test_generate_gives_those_of_the_decoder_with_a_repetition_penalty(made, detail):
    decoder = Decoder(made.models["best"])
    assert torch.equal(detail["penalised"], greedy(decoder, IDS, 1.3))
    assert not torch.equal(detail["penalised"], detail["greedy"])


def test_weights_may_be_loaded_in_bf16(detail):
    error = (detail["bf16 logits"] - detail["logits"]).norm()
    assert error < 0.1 * detail["logits"].norm()  # 8 bits of mantissa, through two blocks


def test_padding_on_the_left_is_not_read(detail):
    assert torch.equal(detail["padded"], detail["alone"])
    torch.testing.assert_close(
        detail["padded logits"].detach(), detail["alone logits"].detach(), rtol=0, atol=1e-5
    )
    assert "padded on the left" in detail["padded on the right"]
    assert "has no padding" in detail["padded behind a state"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("greedy", "without a state"),
        ("greedy", "from a state"),
        ("beams", "beams without a state"),
        ("logits", "in chunks"),
        ("logits", "in a tuple"),
        ("logits", "again"),
        ("in a pipeline", "by the tokenizer"),
    ],
)
def test_what_transformers_does_by_two_ways_is_the_same(detail, one, other):
    if isinstance(detail[one], str):
        assert detail[one] == detail[other]
    else:
        torch.testing.assert_close(detail[one].detach(), detail[other].detach(), rtol=0, atol=1e-5)


def test_labels_give_the_loss_of_the_next_token_and_its_gradient(made, detail):
    model = made.models["best"]
    loss, _ = model.loss(IDS[:, :-1], IDS[:, 1:])
    (gradient,) = torch.autograd.grad(loss, [model.token_embedding.weight])
    torch.testing.assert_close(detail["loss"], loss)
    torch.testing.assert_close(detail["gradient"], gradient)


def test_the_state_does_not_grow(detail):
    short, longer = detail["bytes of the state"]
    assert short == longer


def test_the_last_logits_can_be_had_alone(detail):
    torch.testing.assert_close(detail["last logits"].detach(), detail["logits"][:, -1:])


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "gpt2"])
def test_texts_are_read_and_written_as_by_our_tokenizer(made, kind):
    if kind not in made.tokenizers:
        pytest.skip(f"{MERGES} is absent")
    tokenizer, given = made.tokenizers[kind], made.given[str(made.place / kind)]
    assert given["ids"] == [tokenizer.encode(text) for text in texts()]
    assert given["texts"] == texts()
    assert given["padding"] == "left"


def test_the_harness_takes_a_folder(made):
    if not made.given["harness"]:
        pytest.skip("lm_eval and accelerate are not both installed")
    model = made.models["best"]
    text = torch.tensor([list(b"The bear met")])
    with torch.no_grad():
        log_p = model(text[:, :-1])[0][0].log_softmax(-1)
    wanted = sum(log_p[i - 1, text[0, i]].item() for i in range(8, 12))
    assert made.given["harness"]["likelihood"][0][0] == pytest.approx(wanted, abs=1e-4)
    assert len(made.given["harness"]["generated"]) == 2


def test_nothing_of_the_repository_is_imported(made):
    folders = [ROOT / name for name in ("common", "data", "layers", "inference", "training")]
    files = [Path(file) for file in made.given["files"]]
    assert any(file.name == "network.py" for file in files)
    assert not [f for f in files if f.parent == ROOT or any(d in f.parents for d in folders)]


# ===== In this process


def test_the_source_that_is_cut_out_uses_no_name_that_it_does_not_define():
    """Also where no CPU runs it, such as what only a GPU would call."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "-"]
    done = subprocess.run(command, input=network_source(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("pairs")][::6])
@torch.no_grad()
def test_the_source_that_is_cut_out_computes_the_same(case):
    model = network(case)
    cut = types.ModuleType("network")
    exec(compile(network_source(), "network.py", "exec"), cut.__dict__)
    values = json.loads(model.config.model_dump_json(include=set(Config.network_keys())))
    other = cut.build_model(cut.Config(**values), VOCAB).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(random_ids())[0], model(random_ids())[0])


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return save_byte_run(tiny(), tmp_path / "run")


def command(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    export.main()


def refused(monkeypatch, *arguments) -> str:
    with pytest.raises(InputError) as error:
        command(monkeypatch, *arguments)
    return str(error.value)


def test_a_folder_that_has_something_in_it_is_refused(monkeypatch, run):
    before = sorted(run.iterdir())
    line = refused(monkeypatch, "--checkpoint", run, "--out", run)
    assert line.startswith(f"out: {run} is there already")
    assert sorted(run.iterdir()) == before


def test_a_quantised_checkpoint_is_refused(monkeypatch, run, tmp_path):
    arguments = ["--checkpoint", run, "--bits", 8, "--out", tmp_path / "packed"]
    monkeypatch.setattr(sys, "argv", ["quantize.py", *map(str, arguments)])
    quantize()
    line = refused(monkeypatch, "--checkpoint", tmp_path / "packed", "--out", tmp_path / "out")
    assert "is quantised" in line
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_a_tokenizer_is_refused(monkeypatch, run, tmp_path):
    (run / "tokenizer.json").unlink()
    line = refused(monkeypatch, "--checkpoint", run, "--out", tmp_path / "out")
    assert "no tokenizer" in line


def test_a_tokenizer_is_taken_for_a_checkpoint_that_has_none(monkeypatch, run, tmp_path):
    pytest.importorskip("tokenizers")
    (run / "tokenizer.json").unlink()
    out = tmp_path / "out"
    asked = ("export.py", "--checkpoint", run, "--tokenizer", "bytes", "--out", out)
    monkeypatch.setattr(sys, "argv", [*map(str, asked)])
    export.main()
    assert (out / "tokenizer.json").is_file()


def test_what_is_not_installed_is_named(monkeypatch, run, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.delitem(sys.modules, "inference.huggingface.tokenizer", raising=False)
    line = refused(monkeypatch, "--checkpoint", run, "--out", tmp_path / "out")
    assert "pip install '.[export]'" in line
    assert not (tmp_path / "out").exists()


def test_a_sentencepiece_of_unigrams_is_refused(tmp_path):
    kinds = pytest.importorskip("inference.huggingface.tokenizer", exc_type=ImportError)
    pytest.importorskip("google.protobuf")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a bear met a fox"] * 9), model_prefix=str(tmp_path / "m"),
        model_type="unigram", vocab_size=270, byte_fallback=True, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    tokenizer = SentencePieceTokenizer((tmp_path / "m.model").read_bytes(), exact=False)
    with pytest.raises(InputError, match="is no SentencePiece of byte pairs"):
        kinds.of_sentencepiece(tokenizer)


def test_what_fails_on_the_way_leaves_nothing(monkeypatch, run, tmp_path):
    pytest.importorskip("tokenizers")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_tensors", full)
    line = refused(monkeypatch, "--checkpoint", run, "--out", tmp_path / "out")
    assert line == f"out: {tmp_path / 'out'} cannot be written (No space left on device)"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["name", "owner/name/more", "/name", "owner/", "ow ner/name"])
def test_a_name_that_is_none_on_the_hub_is_refused_before_anything_is_done(
    monkeypatch, run, tmp_path, name
):
    line = refused(
        monkeypatch, "--checkpoint", run, "--out", tmp_path / "out", "--push", name
    )  # fmt: skip
    assert line == f"push: {name} is no name on the hub; give owner/name"
    assert not (tmp_path / "out").exists()


class Hub:
    """Stands in for the hub's API; `calls` are those of all of them."""

    calls: list = []  # noqa: RUF012
    refuses = False

    def create_repo(self, name, private, exist_ok):
        if self.refuses:
            raise OSError("no login")
        self.calls.append(("create", name, private, exist_ok))

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, sorted(p.name for p in Path(folder_path).iterdir())))


@pytest.fixture
def hub(monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


def test_nothing_is_uploaded_unless_asked(monkeypatch, run, tmp_path, hub):
    command(monkeypatch, "--checkpoint", run, "--out", tmp_path / "out")
    assert not hub.calls


def test_push_uploads_the_whole_folder_as_a_private_model(monkeypatch, run, tmp_path, hub):
    command(monkeypatch, "--checkpoint", run, "--out", tmp_path / "out", "--push", "me/mine")
    create, upload = hub.calls
    assert create == ("create", "me/mine", True, True)
    assert upload == ("upload", "me/mine", sorted(p.name for p in (tmp_path / "out").iterdir()))
    assert {"README.md", "config.json", "model.safetensors", "network.py"} <= set(upload[2])


def test_a_hub_that_refuses_leaves_the_folder(monkeypatch, run, tmp_path, hub):
    monkeypatch.setattr(hub, "refuses", True)
    out = tmp_path / "out"
    line = refused(monkeypatch, "--checkpoint", run, "--out", out, "--push", "me/mine")
    assert line.startswith("push: me/mine cannot be uploaded (no login)")
    assert (out / "model.safetensors").is_file()


def test_the_card_has_the_figures_of_the_run_and_a_sample(monkeypatch, run, tmp_path):
    pytest.importorskip("tokenizers")
    result = {"kind": "result", "step": 3, "val_bits_per_byte": 1.62, "parameters": 12345}
    (run / "metrics.jsonl").write_text(json.dumps(result | {"context": "stream"}) + "\n")
    command(monkeypatch, "--checkpoint", run, "--out", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| bits per byte, validation | 1.6200 |" in card
    assert "| parameters | 12,345 |" in card
    assert "```text\nThe history of" in card


def test_a_card_shows_backticks_as_they_stand():
    assert export.fenced("a ``` b") == "````text\na ``` b\n````"
