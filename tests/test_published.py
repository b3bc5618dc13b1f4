"""Weights that others have published load as they lie: without a tokenizer, without a config.json,
by the name of a repository; and a command says what it took for itself."""

import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from helpers import VOCAB, random_ids, randomised, save_byte_run, tiny

import evaluate
import generate
import quantize
from checkpoint import load_model, save_original
from common.command import InputError
from data.tokenizer import (
    ByteTokenizer,
    GPT2Tokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from model import build_model
from research import inspection, probes

OWN = Path(__file__).parent / "fixtures"  # two networks of the first implementation
TALE = "The bears of the valley met the fox, who owed them pears.\n\n" * 30


def published(folder: Path, vocab_size: int, name: str, config: bool = False, **values) -> Path:
    """A file as the first implementation's author publishes it; returns its path."""
    torch.manual_seed(0)
    model = randomised(build_model(tiny(**values), vocab_size))
    folder.mkdir(parents=True, exist_ok=True)
    save_original(model, folder)
    if not config:
        (folder / "config.json").unlink()
    return (folder / "best_model.pt").rename(folder / name)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command's main: returns what it wrote."""

    def call(module, *arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        module.main()
        return capsys.readouterr()

    return call


@pytest.fixture
def gpt2(shared, monkeypatch) -> GPT2Tokenizer:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken"))
    return GPT2Tokenizer()


# ===== The tokenizer


def test_gpt2s_vocabulary_is_read_by_gpt2s_tokenizer(gpt2, command, tmp_path):
    """The two commands that stopped at the missing tokenizer, on the file alone."""
    path = published(tmp_path, 50257, "best_model_wikitext-103.pt", C=8)
    (tmp_path / "tale.txt").write_text(TALE)
    written = command(
        generate, "--checkpoint", path, "--prompt", "The history of", "--num_tokens", 8
    )
    assert written.out.startswith("The history of") and len(written.out) > 20
    assert "GPT-2's has its vocabulary and is taken" in written.err
    result = command(evaluate, "--checkpoint", path, "--data", tmp_path / "tale.txt", "--json").out
    assert json.loads(result)["tokenizer"] == "gpt2"
    assert json.loads(result)["tokens"] == len(gpt2.encode(TALE)) - 1


def test_no_other_vocabulary_is_guessed_and_the_option_is_named(command, tmp_path):
    path = published(tmp_path, 256, "best_model_pg-19.pt")
    for module in (generate, evaluate, probes, inspection):
        with pytest.raises(InputError, match=r"has no tokenizer .*give --tokenizer, one of 256"):
            command(module, "--checkpoint", path)


def test_every_command_takes_a_named_tokenizer(command, tmp_path):
    path = published(tmp_path, 256, "best_model_pg-19.pt", block_size=16)
    (tmp_path / "tale.txt").write_text(TALE)
    options = ["--checkpoint", path, "--tokenizer", "bytes"]
    data = ["--data", tmp_path / "tale.txt"]
    assert command(generate, *options, "--prompt", "One", "--num_tokens", 3).out.startswith("One")
    assert "tokenizer: bytes" in command(evaluate, *options, *data, "--window", 16).out
    assert '"tokenizer": "bytes"' in command(probes, *options, *data, "--windows", 2).out
    command(inspection, *options, *data, "--tokens", 40, "--out", tmp_path / "page")
    assert "bytes tokens" in (tmp_path / "page" / "inspection.md").read_text()
    command(quantize, *options, "--bits", 8, "--out", tmp_path / "int8")
    assert isinstance(load_tokenizer(tmp_path / "int8"), ByteTokenizer)


def test_a_named_tokenizer_counts_before_the_one_beside_and_must_fit(command, gpt2, tmp_path):
    folder = save_byte_run(tiny(), tmp_path)
    (tmp_path / "small.model").write_bytes(train_sentencepiece(iter([TALE]), 300))
    for name, words in {
        "gpt2": "gpt2 has 50,257 tokens, but .* knows 256",
        str(tmp_path / "small.model"): "small.model has 300 tokens, but .* knows 256",
        "gtp2": "did you mean gpt2",
        "nowhere.model": "there is no nowhere.model; give bytes, gpt2 or a .model file",
        str(tmp_path): "is a folder; give a file",
    }.items():
        with pytest.raises(InputError, match=f"^(tokenizer: )?.*{words}"):
            command(generate, "--checkpoint", folder, "--tokenizer", name)
    assert load_model(folder, tokenizer="bytes")[2].name == "bytes"


@pytest.fixture(scope="module")
def changing_model() -> bytes:
    """A SentencePiece model as its own defaults make it: it changes spaces and some characters."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TALE.split("\n")),
        model_writer=made,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return made.getvalue()


def test_a_model_that_changes_text_is_taken_by_name_with_a_note(changing_model, command, tmp_path):
    """The weights were trained with it: no other one would do."""
    (tmp_path / "their.model").write_bytes(changing_model)
    size = SentencePieceTokenizer(changing_model, exact=False).vocab_size
    path = published(tmp_path / "pg", size, "best_model_pg-19.pt")
    options = ["--checkpoint", path, "--tokenizer", tmp_path / "their.model"]
    written = command(generate, *options, "--prompt", "The bears", "--num_tokens", 5)
    assert written.out.startswith("The bears") and "their.model changes text" in written.err
    command(quantize, *options, "--bits", 8, "--out", tmp_path / "int8")
    assert load_tokenizer(tmp_path / "int8").changes is not None
    with pytest.raises(InputError, match="does not keep"):  # where it is not asked for
        SentencePieceTokenizer(changing_model)


# ===== The config


def test_a_network_without_its_config_computes_the_same(tmp_path, capsys):
    """What its tensors cannot show are the defaults, which this one has, or matters to training
    alone."""
    shutil.copy(OWN / "base_plain" / "best_model.pt", tmp_path / "alone.pt")
    assert_fixture(tmp_path / "alone.pt", "base_plain")
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and f"no config.json lies beside {tmp_path / 'alone.pt'}" in line
    assert "block_size 256" in line and 'mixer_gate_activation "silu"' in line
    assert "pkm_top_k" not in line  # it has no memories


def test_a_config_of_the_keys_that_are_not_shown_is_enough(tmp_path, capsys):
    """The line names them; this network has another top_k than the default."""
    shutil.copy(OWN / "released" / "best_model.pt", tmp_path / "alone.pt")
    load_model(tmp_path / "alone.pt")
    assert "pkm_top_k 32, fwpkm_top_k 32" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"pkm_top_k": 8, "fwpkm_top_k": 8}')
    assert_fixture(tmp_path / "alone.pt", "released")


def assert_fixture(path: Path, name: str) -> None:
    """Whether the network of `path` gives the logits of a network of the first implementation."""
    expected = torch.load(OWN / name / "expected.pt", weights_only=True)
    with torch.no_grad():
        logits, _ = load_model(path)[0](expected["ids"])
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "values",
    [
        {"pkm_heads": 2, "low_rank": 0, "wavelet_crawl_k": 5},
        {"use_mixer_gate": False, "per_scale_mixer_widths": None, "fwpkm_enabled": False},
        {"mixer_depth": 2, "per_scale_mixer_widths": None, "mixer_depth_stabilizers": True},
        {"layers": 1, "mlp_layers": 3, "untied_reconstruction": True},
    ],
)
def test_shapes_of_many_networks_are_shown_by_their_tensors_alone(values, tmp_path, capsys):
    values |= {"pkm_top_k": 16, "fwpkm_top_k": 16}  # all slots that TINY has, as by default
    path = published(tmp_path, VOCAB, "best_model_pg-19.pt", **values)
    torch.manual_seed(0)
    expected = randomised(build_model(tiny(**values), VOCAB)).eval()
    ids = random_ids()
    model, config, _ = load_model(path)
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0], expected(ids)[0])
    line = capsys.readouterr().err
    assert ("mixer_gate_activation" in line) == config.use_mixer_gate
    assert ("mixer_depth_residuals" in line) == (config.mixer_depth > 1)
    assert ("looped_blocks" in line) == (config.layers == 1)
    assert ("fwpkm_top_k" in line) == config.fwpkm_enabled


def test_a_config_beside_it_is_read_and_nothing_is_said(tmp_path, capsys):
    path = published(tmp_path, VOCAB, "best_model_pg-19.pt", config=True, block_size=24)
    assert load_model(path)[1].block_size == 24
    assert capsys.readouterr().err == ""


def test_a_config_that_cannot_be_read_is_no_missing_one(tmp_path):
    path = published(tmp_path, VOCAB, "best_model_pg-19.pt")
    (tmp_path / "config.json").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"config\.json: no such config file"):
        load_model(path)


@pytest.mark.parametrize(
    ("name", "dataset"),
    [("best_model_wikitext-103.pt", "wikitext-103"), ("best_model_pg-19.pt", "pg19")],
)
def test_a_published_file_is_known_by_its_name(name, dataset, tmp_path):
    assert load_model(published(tmp_path, VOCAB, name))[1].dataset == dataset
    assert load_model(tmp_path)[1].dataset == dataset  # the only one in its folder


def test_of_several_files_in_a_folder_one_must_be_named(tmp_path):
    for name in ("best_model_wikitext-103.pt", "best_model_pg-19.pt"):
        published(tmp_path, VOCAB, name)
    with pytest.raises(InputError, match=r"has several, best_model_pg-19\.pt, best_model_wiki"):
        load_model(tmp_path)


def test_a_split_of_an_unknown_data_set_is_an_error_that_says_so(command, tmp_path):
    path = published(tmp_path, 256, "theirs.pt")
    with pytest.raises(InputError, match="data: test is a split, but this checkpoint does not say"):
        command(evaluate, "--checkpoint", path, "--tokenizer", "bytes")


# ===== The hub


class Hub:
    """What `huggingface_hub` does, of repositories in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.fetched: list[str] = []

    def model_info(self, identity: str) -> SimpleNamespace:
        root = self.folder / identity
        if not root.is_dir():
            raise OSError(f"404 Client Error.\nRepository Not Found for url: {identity}")
        files = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])

    def hf_hub_download(self, identity: str, name: str) -> str:
        self.fetched.append(name)
        return str(self.folder / identity / name)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    hub = Hub(tmp_path / "hub")
    module = SimpleNamespace(model_info=hub.model_info, hf_hub_download=hub.hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return hub


def test_a_repository_is_a_checkpoint(hub, command, tmp_path):
    folder = tmp_path / "hub" / "someone" / "model"
    folder.mkdir(parents=True)
    save_byte_run(tiny(), folder)
    (folder / "README.md").write_text("A model.")
    written = command(
        generate, "--checkpoint", "someone/model", "--prompt", "One", "--num_tokens", 3
    )
    assert written.out.startswith("One")
    assert hub.fetched == ["best_model.safetensors", "config.json", "tokenizer.json"]
    assert f"note: someone/model is kept at {folder / 'best_model.safetensors'}" in written.err
    # the cache is not ours to write in
    assert not (folder / "generations.txt").exists()


def test_a_file_of_a_repository_is_a_checkpoint(hub, command, tmp_path):
    folder = tmp_path / "hub" / "someone" / "models"
    published(folder, 256, "best_model_wikitext-103.pt")
    published(folder / "more", 256, "best_model_pg-19.pt", config=True)
    options = ["--tokenizer", "bytes", "--prompt", "One", "--num_tokens", 3]
    name = "someone/models:more/best_model_pg-19.pt"
    assert command(generate, "--checkpoint", name, *options).out.startswith("One")
    assert hub.fetched == ["more/best_model_pg-19.pt", "more/config.json"]
    hub.fetched.clear()
    # the only one at the top
    assert command(generate, "--checkpoint", "someone/models", *options).out.startswith("One")
    assert hub.fetched == ["best_model_wikitext-103.pt"]


def test_what_the_hub_has_not_is_one_line(hub, command, tmp_path, monkeypatch):
    published(tmp_path / "hub" / "someone" / "two", VOCAB, "best_model_a.pt")
    published(tmp_path / "hub" / "someone" / "two", VOCAB, "best_model_b.pt")
    (tmp_path / "hub" / "someone" / "none").mkdir()
    for name, words in {
        "someone/nothing": "cannot be had (404 Client Error.); check the name",
        "someone/two": "has several, best_model_a.pt, best_model_b.pt; name one",
        "someone/two:c.pt": "has no file c.pt; its files are best_model_a.pt, best_model_b.pt",
        "someone/none": "no such checkpoint",
    }.items():
        with pytest.raises(InputError) as error:
            command(generate, "--checkpoint", name)
        assert words in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub"):
        command(generate, "--checkpoint", "someone/two")


def test_a_path_that_is_misspelt_is_not_asked_for_on_the_hub(hub, command):
    Path("logs").mkdir()
    for name in ("logs/RUN", "./RUN", "logs/RUN/best_model.pt", "RUN/best_model.safetensors"):
        with pytest.raises(InputError, match="no such checkpoint"):
            command(generate, "--checkpoint", name)
    assert hub.fetched == []


def test_inspection_of_a_repository_needs_a_folder_for_its_page(hub, command, tmp_path):
    folder = tmp_path / "hub" / "someone" / "model"
    folder.mkdir(parents=True)
    save_byte_run(tiny(), folder)
    with pytest.raises(InputError, match="out: give a folder"):
        command(inspection, "--checkpoint", "someone/model")
