"""Going on: from trained weights with a new run, and with a run on another schedule."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import ROOT, SMALL, run, save_byte_run, tiny

import train as train_module
from checkpoint import load_model, save_model, save_original
from common.command import InputError
from common.tensors import load_tensors
from config import make_config, save_config
from data.tokenizer import (
    ByteTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from model import build_model
from quantize import main as quantize_main
from training.origin import check_vocabulary, config_from, read_origin
from training.record import read_metrics
from training.trainer import Trainer

NEW_TEXT = "".join(f"Page {i}: {i * 7} ships left harbour {i % 5}.\n" for i in range(200))


@pytest.fixture
def trained(tmp_path):
    """A run's folder with weights, a config and a tokenizer, of a network over bytes."""
    folder = tmp_path / "trained"
    folder.mkdir()
    config = make_config(SMALL | {"dataset": "elsewhere.txt", "layers": 1, "C": 8}, "test")
    return save_byte_run(config, folder)


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Begins a run with a checkpoint, on another text; returns the run's folder."""
    (tmp_path / "new.txt").write_text(NEW_TEXT, encoding="utf-8")

    def call(checkpoint, *more, out="logs"):
        folders = {"--out_dir": tmp_path / out, "--cache_dir": tmp_path / "cache"}
        options = [word for pair in folders.items() for word in pair]
        text = ["--dataset", tmp_path / "new.txt", "--device", "cpu"]
        run(monkeypatch, "--init_from", checkpoint, *text, *options, "--max_steps", 2, *more)
        return max((tmp_path / out).iterdir(), key=lambda folder: folder.stat().st_mtime_ns)

    return call


def metrics(folder, kind):
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == kind]


# ===== From trained weights


def test_a_run_from_weights_has_their_network_and_tokenizer_and_says_where_they_are_from(
    trained, begin, tmp_path, monkeypatch
):
    first = {}
    save = Trainer.save

    def noted(self, again=False):
        if self.step == 0:
            first.update({k: t.clone() for k, t in self.tensors()["model"].items()})
            assert not any(state.any() for state in self.tensors()["optimizer"].values())
        save(self, again)

    monkeypatch.setattr(Trainer, "save", noted)
    folder = begin(trained, "--lr", "0.001")
    file = trained / "best_model.safetensors"
    weights = load_tensors(file)  # which the run has left as they were
    assert weights.keys() == first.keys()
    assert all(torch.equal(weights[name], first[name]) for name in weights)
    config = json.loads((folder / "config.json").read_text())
    assert (config["C"], config["layers"], config["lr"]) == (8, 1, 0.001)
    assert (folder / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    origin = json.loads((folder / "env.json").read_text())["init_from"]
    assert origin == {
        "path": str(file.resolve()),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    assert f"begins with {file.resolve()}" in (folder / "log.txt").read_text()
    assert not torch.equal(
        load_tensors(folder / "best_model.safetensors")["lm_head.weight"],
        weights["lm_head.weight"],
    )


def test_the_new_text_is_encoded_with_the_tokenizer_of_the_weights(tmp_path, begin):
    folder = tmp_path / "words"
    folder.mkdir()
    other = "".join(f"Row {i} of {i % 9} rowing rows.\n" for i in range(300))
    tokenizer = SentencePieceTokenizer(train_sentencepiece(iter([other]), 300), "test")
    values = SMALL | {"dataset": "elsewhere.txt", "tokenizer": "sentencepiece", "vocab_size": 300}
    config = make_config(values | {"layers": 1, "C": 8}, "test")
    save_model(build_model(config, 300), folder / "best_model.safetensors")
    save_config(config, folder / "config.json")
    tokenizer.save(folder)
    begun = begin(folder)
    kept = json.loads((begun / "data.json").read_text())["tokenizer"]
    assert kept == {"name": "sentencepiece-300", "fingerprint": tokenizer.fingerprint}
    assert load_tokenizer(begun).fingerprint == tokenizer.fingerprint
    with pytest.raises(InputError, match="vocab_size: 400, but the weights in .* have 300"):
        begin(folder, "--vocab_size", 400)


@pytest.mark.parametrize("kind", ["file", "old"])
def test_a_run_begins_with_a_safetensors_file_or_an_old_pt_too(kind, trained, begin, tmp_path):
    checkpoint = trained / "best_model.safetensors"
    if kind == "old":
        model, _, tokenizer = load_model(trained)
        (tmp_path / "old").mkdir()
        save_original(model, tmp_path / "old")
        tokenizer.save(tmp_path / "old")
        checkpoint = tmp_path / "old"
    # What an old config says of training is not read, so a batch is given as a run's own has it.
    small = ["--micro_batch_size", 4, "--num_new_tokens", 4, "--use_amp", "false"]
    folder = begin(checkpoint, *small, "--compile", "false", "--eval_tokens", 64)
    assert metrics(folder, "result")[0]["steps"] == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--layers", "3"], r"layers: 3, but the weights in .* have 1"),
        (["--C", '"x"'], r"C: .*x.*, but the weights in .* have 8"),
        (["--tokenizer", "gpt2"], r"tokenizer: \"gpt2\", but the weights in .* have \"bytes\""),
        (["--resume", "logs"], "init_from: a run that is resumed"),
        (["--lr", "-1"], "lr: "),
    ],
)
def test_a_key_that_does_not_fit_the_weights_is_one_line_that_names_it(
    trained, begin, tmp_path, options, named
):
    with pytest.raises(InputError, match=named) as caught:
        begin(trained, *options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "logs").exists()


def test_a_network_key_in_a_config_file_must_fit_and_others_are_taken(trained, begin, tmp_path):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"C": 8, "weight_decay": 0.5, "dropout_mlp": 0.3}))
    config = json.loads((begin(trained, "--config", path) / "config.json").read_text())
    assert (config["weight_decay"], config["dropout_mlp"]) == (0.5, 0.3)
    path.write_text(json.dumps({"levels": 2}))
    with pytest.raises(InputError, match=r"keys\.json: levels: 2, but the weights") as caught:
        begin(trained, "--config", path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("checkpoint", ["", "nowhere", "tale"])
def test_what_is_no_checkpoint_is_one_line_to_begin_with(begin, tmp_path, checkpoint):
    (tmp_path / "tale").write_text("a text")
    with pytest.raises(InputError) as caught:
        begin(tmp_path / checkpoint if checkpoint else "")
    assert "\n" not in str(caught.value) and not (tmp_path / "logs").exists()


def test_a_quantised_checkpoint_is_refused_in_one_line(trained, begin, tmp_path, monkeypatch):
    packed = tmp_path / "packed"
    arguments = ["quantize.py", "--checkpoint", trained, "--bits", "8", "--out", packed]
    monkeypatch.setattr("sys.argv", list(map(str, arguments)))
    quantize_main()
    with pytest.raises(InputError, match="init_from: .* is quantised") as caught:
        begin(packed)
    assert "\n" not in str(caught.value) and not (tmp_path / "logs").exists()


def test_a_run_from_weights_is_resumed_without_them_from_its_first_moment(
    trained, begin, tmp_path, monkeypatch
):
    whole = begin(trained, out="whole")
    take_step = Trainer.take_step

    def killed(self):
        raise MemoryError  # as good as a kill: nothing is saved for it

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", killed)
        patch.setattr(train_module.shutil, "rmtree", lambda *_, **options: None)
        with pytest.raises(MemoryError):
            begin(trained)
    (folder,) = (tmp_path / "logs").iterdir()
    for path in trained.iterdir():
        path.unlink()
    assert Trainer.take_step is take_step
    run(monkeypatch, "--resume", folder)
    one = load_tensors(whole / "best_model.safetensors")
    other = load_tensors(folder / "best_model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    (folder / "latest.pt").unlink()
    for name in ("metrics.jsonl", "best_model.safetensors"):
        (folder / name).unlink()
    with pytest.raises(InputError, match="stopped before it had the weights"):
        run(monkeypatch, "--resume", folder)


def test_weights_of_another_vocabulary_than_the_tokenizers_are_one_line(trained):
    origin = replace(read_origin(str(trained)), vocab_size=300, tokenizer=None)
    check_vocabulary(replace(origin, vocab_size=256), ByteTokenizer())
    with pytest.raises(InputError, match=r"tokenizer: bytes has 256 tokens.* know 300") as caught:
        check_vocabulary(origin, ByteTokenizer())
    assert "\n" not in str(caught.value)


# ===== On another schedule


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folder of a run that has ended after four steps."""
    place = tmp_path_factory.mktemp("ended")
    (place / "text.txt").write_text(NEW_TEXT, encoding="utf-8")
    values = {"dataset": "text.txt", "out_dir": "logs", "cache_dir": "cache", "max_steps": 4}
    values |= {key: str(place / values[key]) for key in ("dataset", "out_dir", "cache_dir")}
    (place / "keys.json").write_text(json.dumps(SMALL | values))
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "--config", place / "keys.json")
    (folder,) = (place / "logs").iterdir()
    return folder


@pytest.fixture
def finished(ended, tmp_path):
    """A copy of it that a test may go on with."""
    return shutil.copytree(ended, tmp_path / "finished")


def test_a_finished_run_goes_on_with_a_changed_schedule_and_keeps_its_old_result(
    finished, monkeypatch, capsys
):
    before = metrics(finished, "result")
    run(monkeypatch, "--resume", finished, "--max_steps", 6, "--lr", "0.02", "--min_lr", "0.001")
    config = json.loads((finished / "config.json").read_text())
    assert (config["max_steps"], config["lr"], config["min_lr"]) == (6, 0.02, 0.001)
    (line,) = metrics(finished, "schedule")
    assert line["step"] == 4
    assert line["before"] == {"max_steps": 4, "lr": 0.01, "min_lr": 0.0002}
    assert line["now"] == {"max_steps": 6, "lr": 0.02, "min_lr": 0.001}
    log = (finished / "log.txt").read_text()
    assert "schedule changed after step 4: max_steps 4 -> 6, lr 0.01 -> 0.02" in log
    results = metrics(finished, "result")
    assert results[:1] == before and [result["steps"] for result in results] == [4, 6]
    assert [line["step"] for line in metrics(finished, "train")] == [1, 2, 3, 4, 5, 6]
    # From now on the new schedule is the run's: resumed as it is, nothing is changed or done.
    capsys.readouterr()
    text = (finished / "metrics.jsonl").read_text()
    run(monkeypatch, "--resume", finished)
    assert (finished / "metrics.jsonl").read_text() == text
    assert "steps: 6" in capsys.readouterr().out


@pytest.mark.parametrize("moment", ["write_config", "metric", "second save", "take_step"])
def test_a_kill_while_the_schedule_changes_loses_nothing(finished, monkeypatch, moment):
    before = metrics(finished, "result")
    with monkeypatch.context() as patch:
        calls = []

        def killed(*_, **values):
            raise MemoryError

        def second(self, again=False):
            calls.append(again)
            if len(calls) == 2:
                raise MemoryError
            save(self, again)

        save = Trainer.save
        if moment == "second save":
            patch.setattr(Trainer, "save", second)
        elif moment == "take_step":
            patch.setattr(Trainer, "take_step", killed)
        else:
            patch.setattr(f"training.record.Record.{moment}", killed)
        with pytest.raises(MemoryError):
            run(monkeypatch, "--resume", finished, "--max_steps", 6)
    # Until config.json is written the run is as it was, and is to be told again.
    again = ["--max_steps", 6] if moment == "write_config" else []
    run(monkeypatch, "--resume", finished, *again)
    assert [line["step"] for line in metrics(finished, "schedule")] == [4]
    assert metrics(finished, "result")[:1] == before
    assert [line["step"] for line in metrics(finished, "train")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("options", [["--lr", "0.02"], ["--max_steps", "3"], ["--epochs", "0.01"]])
def test_a_schedule_that_leaves_no_step_is_one_line_and_changes_nothing(
    finished, monkeypatch, options
):
    names = ("config.json", "metrics.jsonl", "latest.pt")
    before = [(finished / name).read_bytes() for name in names]
    with pytest.raises(
        InputError, match="resume: 4 steps are taken.*max_steps or epochs"
    ) as caught:
        run(monkeypatch, "--resume", finished, *options)
    assert "\n" not in str(caught.value)
    assert [(finished / name).read_bytes() for name in names] == before


def test_a_run_stopped_before_its_first_save_begins_with_the_changed_schedule(
    finished, monkeypatch
):
    # As a kill leaves it before its first save: lines of steps, no state, no weights.
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (finished / "metrics.jsonl").write_text(lines[0])
    (finished / "latest.pt").unlink()
    (finished / "best_model.safetensors").unlink()
    run(monkeypatch, "--resume", finished, "--lr", "0.02")
    assert json.loads((finished / "config.json").read_text())["lr"] == 0.02
    (line,) = metrics(finished, "schedule")
    assert (line["step"], line["before"], line["now"]) == (0, {"lr": 0.01}, {"lr": 0.02})
    assert [line["step"] for line in metrics(finished, "train")] == [1, 2, 3, 4]


def test_a_save_of_before_schedules_could_change_goes_on_with_its_config(finished, monkeypatch):
    values = torch.load(finished / "latest.pt", weights_only=True)
    del values["schedule"]
    torch.save(values, finished / "latest.pt")
    run(monkeypatch, "--resume", finished)
    assert not metrics(finished, "schedule")
    run(monkeypatch, "--resume", finished, "--max_steps", 5)
    assert metrics(finished, "schedule")[0]["before"] == {"max_steps": 4}


def test_the_pages_name_the_keys_of_the_schedule():
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in page for key in train_module.SCHEDULE_KEYS)


@pytest.mark.parametrize("name", ["best_model.pt", "best_model_wikitext-103.pt"])
def test_a_folder_of_old_weights_is_an_origin_under_any_of_their_names(tmp_path, name):
    model = build_model(tiny(layers=1), 256)
    save_original(model, tmp_path)
    (tmp_path / "best_model.pt").rename(tmp_path / name)
    ByteTokenizer().save(tmp_path)
    origin = read_origin(str(tmp_path))
    assert origin.file.name == name
    # The tokenizer may be named as what it came to be, too.
    assert config_from(origin, None, {"tokenizer": "bytes"}).tokenizer == "bytes"
    with pytest.raises(InputError, match="tokenizer"):
        config_from(origin, None, {"tokenizer": "gpt2"})
