"""Training as a user runs it: files, figures, kills, resumption, bad input. Tiny network, tiny
text."""

import contextlib
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import (
    NO_DROPOUT,
    ROOT,
    SMALL,
    new_trainer,
    only_run,
    run,
    run_in_child,
    write_settings,
    write_text,
)

import train as train_module
from common.command import InputError, run_command
from common.tensors import load_tensors
from config import make_config
from data.order import Windows
from data.tokens import FORMAT, HEADER_BYTES, TokenFile
from layers import passes
from layers.features import token_features
from training.loop import hours
from training.optimizers import LossScale
from training.profiling import work_per_token
from training.record import Record
from training.trainer import LATEST, PATIENCE, Trainer


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def untimed(folder):
    """The metrics without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = {
        "tokens_per_second",
        "seconds",
        "memory_gib",
        "peak_memory_mib",
        "evaluation_share",
        "run_dir",
    }
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def assert_same_run(a, b):
    for name in ("latest.pt", "best_model.safetensors"):
        one, two = (
            (
                torch.load(f / name, weights_only=True)["model"]
                if name.endswith(".pt")
                else load_tensors(f / name)
            )
            for f in (a, b)
        )
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
    assert untimed(a) == untimed(b)
    assert (a / "samples.txt").read_text() == (b / "samples.txt").read_text()


class Trained(NamedTuple):
    folder: Path
    printed: list[str]

    def copy(self, tmp_path):
        """The run again, to be changed: where `only_run` looks for it."""
        return Path(shutil.copytree(self.folder, tmp_path / "logs" / self.folder.name))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the settings as they are, trained to its end once for all tests, which leave it as
    it is."""
    place = tmp_path_factory.mktemp("trained")
    write_text(place)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        run(patch, "--config", write_settings(place))
    return Trained(only_run(place), printed.getvalue().splitlines())


def test_a_run_writes_exactly_the_promised_files_and_figures(trained):
    folder, lines = trained
    assert lines[0] == f"run: {folder}"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "env.json", "data.json", "log.txt", "metrics.jsonl", "curves.png",
        "samples.txt", "tokenizer.json",
        "best_model.safetensors", "latest.pt",
    }  # fmt: skip
    figures = dict(line.split(": ", 1) for line in lines[-30:] if ": " in line)
    for key in (
        "val_bits_per_byte",
        "test_bits_per_byte",
        "bigram_val_bits_per_byte",
        "tokens_per_second",
    ):
        assert math.isfinite(float(figures[key])), key
    for key in ("peak_memory_mib", "parameters", "seconds"):
        assert float(figures[key]) > 0
    assert json.loads((folder / "config.json").read_text())["C"] == 16
    first, second, third, _, generate, evaluate = lines[lines.index("---") + 1 :][:6]
    assert first.startswith(f"Trained a network of {int(figures['parameters']):,} parameters on ")
    assert "for 12 steps of 64 tokens" in first
    assert f"{float(figures['val_bits_per_byte']):.3f} bits per byte" in second
    assert f"{float(figures['bigram_val_bits_per_byte']):.3f} of a bigram" in second
    assert third.endswith(f"lie in {folder}.")
    assert generate.split() == [
        "python", "generate.py", "--checkpoint", str(folder), "--prompt", "'The", "'"
    ]  # fmt: skip
    assert f"python evaluate.py --checkpoint {folder}" in evaluate
    # The block of figures stays the end of the output, and is in the log as it was printed.
    block = lines[lines.index(evaluate) + 1 :]
    assert block[0].startswith("val_loss: ") and block[-1] == f"run_dir: {folder}"
    assert all(re.fullmatch(r"\w+: \S+", line) for line in block)
    assert (folder / "log.txt").read_text().splitlines()[-len(block) :] == block
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00:00"), (59.9, "0:00:59"), (3661, "1:01:01"), (90061, "25:01:01")],
)
def test_time_is_shown_in_hours_minutes_and_seconds(seconds, shown):
    assert hours(seconds) == shown


def test_the_words_at_the_end_say_so_where_a_run_is_no_good():
    assert "27% more than the 4.000 of a bigram" in train_module.how_good(5.08, 4.0)
    assert "50% fewer than the 4.000 of a bigram" in train_module.how_good(2.0, 4.0)
    for value in (None, math.nan, math.inf):
        assert train_module.how_good(value, 4.0).startswith("Its loss on the validation text is")


def test_the_help_has_one_line_of_usage(capsys):
    with pytest.raises(SystemExit):
        train_module.make_parser().parse_args(["--help"])
    usage, _, rest = capsys.readouterr().out.partition("\n\n")
    assert usage.endswith(" [--config FILE] [--KEY VALUE ...] [--resume RUN_DIR]")
    assert "\n" not in usage
    assert rest.count("--layers VALUE") == 1


def test_training_lowers_the_validation_loss(settings, tmp_path, monkeypatch):
    run(monkeypatch, "--config", settings(max_steps=30, eval_interval=15, lr=0.05, **NO_DROPOUT))
    losses = [m["loss"] for m in untimed(only_run(tmp_path)) if m["kind"] == "validation"]
    assert losses[-1] < losses[0] - 0.3


def test_a_run_without_our_own_library_says_so_and_trains(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(passes.LIBRARY, "missing", lambda: "there is no C++ compiler g++")
    monkeypatch.setattr(passes.LIBRARY, "get", lambda: None)
    run(monkeypatch, "--config", settings(max_steps=2, compile=False))
    told = [line for line in capsys.readouterr().out.splitlines() if "no C++ compiler" in line]
    assert told == ["steps by torch alone, which is slower: there is no C++ compiler g++"]
    assert only_run(tmp_path).is_dir()


def stop_at_step(step, number):
    """Makes this process send itself a signal when it begins the step after `step`."""
    take_step = Trainer.take_step

    def stopped(self):
        if self.step == step:
            os.kill(os.getpid(), number)
        return take_step(self)

    Trainer.take_step = stopped


@pytest.mark.parametrize(
    ("number", "code", "saved", "carry"),
    [
        (signal.SIGKILL, -signal.SIGKILL, 4, True),
        (signal.SIGTERM, 128 + signal.SIGTERM, 7, False),
    ],
)
def test_a_stopped_run_resumes_bit_for_bit(
    settings, tmp_path, monkeypatch, capsys, trained, number, code, saved, carry
):
    options = ["--config", settings(decompose_bypass_cross_window=carry)]
    whole = trained.folder
    if carry:
        run(monkeypatch, *options, "--out_dir", tmp_path / "whole")
        (whole,) = (tmp_path / "whole").iterdir()
    # two steps after the save at 4: the lines of these two are in the log, and not of the save
    broken = run_in_child(*options, prepare=lambda: stop_at_step(6, number))
    broken.join()
    assert broken.exitcode == code
    folder = only_run(tmp_path)
    assert torch.load(folder / LATEST, weights_only=True)["step"] == saved
    capsys.readouterr()
    run(monkeypatch, "--resume", folder)
    assert capsys.readouterr().out.splitlines()[0] == f"run: {folder}"
    assert_same_run(whole, folder)


def trainer_of(tmp_path, text, **overrides):
    config = make_config(
        SMALL | {"dataset": str(text), "cache_dir": str(tmp_path / "cache")} | overrides, "test"
    )
    return new_trainer(config, tmp_path, "cpu")


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_accumulated_micro_batches_take_the_step_of_the_whole_batch(tmp_path, text):
    one = trainer_of(tmp_path, text, micro_batch_size=8, grad_accum=1, **NO_DROPOUT)
    four = trainer_of(tmp_path, text, micro_batch_size=2, grad_accum=4, **NO_DROPOUT)
    for _ in range(4):
        (loss, norm), (loss4, norm4) = one.take_step(), four.take_step()
        torch.testing.assert_close(loss, loss4)
        assert norm.item() == pytest.approx(norm4.item(), rel=1e-4)
    torch.testing.assert_close(weights(one), weights(four), atol=1e-4, rtol=1e-3)


def test_evaluation_leaves_training_as_it_was(tmp_path, text):
    plain, watched = trainer_of(tmp_path, text), trainer_of(tmp_path, text)
    tokens = torch.arange(100) % 90
    for _ in range(3):
        plain.take_step()
        watched.take_step()
        watched.validation_nats(tokens)
    assert torch.equal(weights(plain), weights(watched))


def test_a_step_without_a_finite_gradient_changes_nothing_and_many_stop_the_run(tmp_path, text):
    trainer = trainer_of(tmp_path, text)
    trainer.take_step()
    before, loss = weights(trainer), trainer.loss
    trainer.loss = lambda ids, targets, state: (loss(ids, targets, state)[0] * float("nan"), state)
    trainer.take_step()
    assert torch.equal(weights(trainer), before)
    assert trainer.skipped == 1
    with pytest.raises(InputError, match="token_embedding.weight"):
        for _ in range(PATIENCE):
            trainer.take_step()
    assert torch.equal(weights(trainer), before)


def test_fp8_is_refused_without_a_gpu_that_has_it(tmp_path, text):
    with pytest.raises(InputError, match="amp_dtype: fp8 needs a GPU"):
        trainer_of(tmp_path, text, amp_dtype="fp8", use_amp=True)


def test_counting_the_work_of_a_step_changes_nothing_that_is_saved(tmp_path, text):
    trainer = trainer_of(tmp_path, text, stab_spectral_norm=True)
    before = {name: tensor.clone() for name, tensor in trainer.tensors()["model"].items()}
    assert work_per_token(trainer) > 0
    after = trainer.tensors()["model"]
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_an_fp16_overflow_lowers_the_scale_and_is_no_bad_step(tmp_path, text):
    trainer = trainer_of(tmp_path, text)
    trainer.scaler = LossScale("cpu", enabled=True)
    # squares of its gradients are beyond fp32, from 2**55 on they are not
    trainer.scaler.scale.fill_(2.0**60)
    loss, before = trainer.loss, weights(trainer).clone()
    trainer.loss = lambda ids, targets, state: (256 * loss(ids, targets, state)[0], state)
    trainer.step = 1  # step 0 has a learning rate of 0
    trainer.take_step()
    assert torch.equal(weights(trainer), before)
    assert trainer.scaler.scale == 2.0**59
    for _ in range(12):
        trainer.take_step()
    assert not torch.equal(weights(trainer), before)
    assert (trainer.skipped, trainer.bad_in_a_row) == (0, 0)


def test_carried_state_enters_the_next_window_and_is_cut_from_the_gradient(tmp_path, text):
    trainer = trainer_of(tmp_path, text, decompose_bypass_cross_window=True, **NO_DROPOUT)
    assert trainer.micro_batch(0)[2].nbytes == trainer.model.start(4, stream=True).nbytes
    trainer.take_step()
    state = trainer.micro_batch(0)[2]
    assert all(not tensor.requires_grad for block in state.blocks for tensor in block.values())
    assert state.blocks[0]["count"].tolist() == [16] * 4
    ids, targets, _ = trainer.micro_batch(0)
    assert trainer.model.loss(ids, targets, state)[0] != trainer.model.loss(ids, targets)[0]


def test_a_run_with_token_features_has_those_of_its_tokenizer(tmp_path, text):
    trainer = trainer_of(tmp_path, text, token_features=True)
    loss, norm = trainer.take_step()
    assert loss.isfinite() and norm.isfinite()
    assert torch.equal(
        trainer.model.token_embedding.basis, token_features(trainer.corpus.tokenizer)
    )


OPTIMIZERS = ["Adagrad", "AdamW", "Muon", "SGD"]


def test_muon_takes_hidden_matrices_only_and_both_rates_follow_the_schedule(tmp_path, text):
    trainer = trainer_of(tmp_path, text, optimizer="Muon", lr=0.01, muon_lr=0.03, momentum=0.9)
    muon, adam = trainer.optimizers
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert {"layers.0.mixers.banks.0.0.mixer.weight", "layers.0.ffwd.0.weight"} <= taken
    tables = (
        "embedding",
        "lm_head",
        "values",
        "keys_a",
        "ln1",
        "alpha",
        "history_gains",
        "scale_routing",
        "bias",
    )
    assert not [name for name in taken if any(part in name for part in tables)]
    for _ in range(3):
        trainer.take_step()
    assert muon.param_groups[0]["lr"] == pytest.approx(3 * adam.param_groups[0]["lr"])
    assert muon.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_lowers_the_loss_and_resumes_bit_for_bit(tmp_path, text, name):
    options = {"optimizer": name, "lr": 0.01, "ema_decay": 0.9, "max_steps": 24, **NO_DROPOUT}
    whole = trainer_of(tmp_path, text, **options)
    losses = [whole.take_step()[0].item() for _ in range(4)]
    whole.save()
    losses += [whole.take_step()[0].item() for _ in range(10)]
    resumed = trainer_of(tmp_path, text, **options)
    resumed.restore()
    assert [resumed.take_step()[0].item() for _ in range(10)] == losses[4:]
    assert sum(losses[-4:]) < sum(losses[:4])
    for group, tensors in whole.tensors().items():
        assert all(
            torch.equal(tensor, resumed.tensors()[group][key]) for key, tensor in tensors.items()
        ), group


def test_the_average_of_the_weights_is_their_moving_average_and_leaves_them_alone(tmp_path, text):
    averaged, plain = trainer_of(tmp_path, text, ema_decay=0.3), trainer_of(tmp_path, text)
    expected = weights(plain)
    for step in range(4):
        averaged.take_step()
        plain.take_step()
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights(plain)
    raw = weights(averaged).clone()
    assert torch.equal(raw, weights(plain))
    with averaged.average.in_place():
        torch.testing.assert_close(weights(averaged), expected)
    assert torch.equal(weights(averaged), raw)


def test_the_average_is_evaluated_and_saved_beside_the_weights(
    settings, tmp_path, monkeypatch, capsys
):
    run(monkeypatch, "--config", settings(ema_decay=0.9, max_steps=6, eval_interval=3))
    folder = only_run(tmp_path)
    assert [m["step"] for m in untimed(folder) if m["kind"] == "average"] == [3, 6]
    one, other = (
        load_tensors(folder / "best_model.safetensors"),
        load_tensors(folder / "average_model.safetensors"),
    )
    assert one.keys() == other.keys() and not torch.equal(
        one["lm_head.weight"], other["lm_head.weight"]
    )
    assert "average_val_bits_per_byte: " in capsys.readouterr().out


def test_a_changed_config_on_resume_is_an_error_that_names_the_keys(trained, tmp_path, monkeypatch):
    folder = trained.copy(tmp_path)
    before = contents(folder)
    with pytest.raises(InputError, match=r"weight_decay.*only the schedule may change"):
        run(monkeypatch, "--resume", folder, "--weight_decay", "0.5")
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"dataset": "nowhere/tale.txt"}, "nowhere/tale.txt"),
        ({"dataset_mix": {"nowhere/tale.txt": 1.0}}, "nowhere/tale.txt"),
        ({"dataset_mix": {"": 1.0}}, "dataset_mix"),
        ({"block_size": 60000}, "block_size"),
        ({"levels": 9}, "levels"),
        ({"C": 0}, "C"),
        ({"wavelett": 1}, "wavelett"),
        ({"out_dir": "/proc/nowhere"}, "out_dir"),
    ],
)
def test_bad_settings_are_one_line_that_names_the_key(settings, monkeypatch, overrides, named):
    with pytest.raises(InputError) as caught:
        run(monkeypatch, "--config", settings(**overrides))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("levels", "block_size"), [(1, 2), (2, 3), (8, 256), (9, 257)])
def test_as_many_levels_are_trained_as_look_back_within_a_window(levels, block_size):
    config = make_config(
        {"levels": levels, "block_size": block_size, "per_scale_mixer_widths": None}, "test"
    )
    train_module.check_levels(config)
    more = config.model_copy(update={"levels": levels + 1})
    with pytest.raises(InputError, match=f"at most {levels} levels"):
        train_module.check_levels(more)
    train_module.check_levels(more.model_copy(update={"decompose_bypass_cross_window": True}))


def test_a_missing_config_ends_the_command_with_one_line_and_exit_code_2(tmp_path):
    """A process of its own: what main raises is for the script to end with."""
    process = start("--config", tmp_path / "none.json")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2, error
    assert len(error.splitlines()) == 1 and "none.json" in error


@pytest.mark.parametrize(("name", "text"), [("empty.txt", b""), ("latin.txt", b"caf\xe9 " * 100)])
def test_a_text_that_is_none_ends_a_command_with_one_line_that_names_it(
    tmp_path, monkeypatch, capsys, name, text
):
    (tmp_path / name).write_bytes(text)
    options = ["--out_dir", tmp_path / "logs", "--cache_dir", tmp_path / "cache"]
    with pytest.raises(SystemExit) as end:
        run_command(lambda: run(monkeypatch, "--dataset", tmp_path / name, *options))
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert len(error.splitlines()) == 1 and name in error


# ===== Nothing is lost


def endured(options, kills, generator):
    """Runs train.py, kills it at `kills` random moments, and goes on each time. Returns the run's
    folder."""
    process = start(*options)
    folder = Path(process.stdout.readline().removeprefix("run: ").strip())
    for _ in range(kills):
        had = len(steps_logged(folder))
        while len(steps_logged(folder)) < had + 1 and process.poll() is None:
            time.sleep(0.002)
        time.sleep(generator.random() * 0.2)
        process.kill()
        process.communicate()
        process = start("--resume", folder)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return folder


def steps_logged(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().split('"kind": "train"')[1:] if path.exists() else []


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_like_one_that_was_not(settings, tmp_path):
    options = [
        "--config",
        settings(max_steps=300, save_interval=3, eval_interval=50, ema_decay=0.9),
    ]
    whole = start(*options, "--out_dir", tmp_path / "whole")
    folder = endured([*options, "--out_dir", tmp_path / "broken"], 10, random.Random(0))
    whole.communicate(timeout=300)
    assert_same_run(next((tmp_path / "whole").iterdir()), folder)


def die_in_second_save():
    """Makes this process kill itself when half of its second save is written."""
    save, saves = torch.save, []

    def half(values, file):
        saves.append(None)
        if len(saves) == 2:
            file.write(b"half a file")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(values, file)

    torch.save = half


def test_a_kill_during_a_save_leaves_the_last_whole_one(settings, tmp_path, monkeypatch, trained):
    broken = run_in_child("--config", settings(), prepare=die_in_second_save)
    broken.join()
    assert broken.exitcode == -signal.SIGKILL
    folder = only_run(tmp_path)
    assert torch.load(folder / LATEST, weights_only=True)["step"] == 4
    assert list(folder.glob(".latest*"))
    run(monkeypatch, "--resume", folder)
    assert not list(folder.glob(".*"))
    assert_same_run(trained.folder, folder)


def test_a_full_disk_is_one_line_and_keeps_the_last_save(tmp_path, text):
    trainer = trainer_of(tmp_path, text)
    trainer.take_step()
    trainer.save()
    trainer.take_step()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(InputError, match="latest.pt: cannot be written") as caught:
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["latest.pt"]
    resumed = trainer_of(tmp_path, text)
    resumed.restore()
    assert resumed.step == 1


def test_a_text_that_was_edited_is_one_line_on_resume_and_changes_nothing(
    settings, tmp_path, text, monkeypatch
):
    run(monkeypatch, "--config", settings(max_steps=2))
    before = {path.name: path.read_bytes() for path in only_run(tmp_path).iterdir()}
    text.write_text(text.read_text(encoding="utf-8").replace("bears", "boars"), encoding="utf-8")
    with pytest.raises(
        InputError, match=r"resume: .* train has [\d,]+ bytes, but others"
    ) as caught:
        run(monkeypatch, "--resume", only_run(tmp_path))
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in only_run(tmp_path).iterdir()} == before


def test_a_run_has_full_paths_so_it_means_the_same_from_any_folder(
    settings, tmp_path, text, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "--config", settings(max_steps=2, dataset=text.name))
    folder = only_run(tmp_path)
    assert json.loads((folder / "config.json").read_text())["dataset"] == str(text)
    run(monkeypatch, "--resume", folder, "--config", tmp_path / "config.json")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / text.name).write_text("Another text of the same name.\n" * 200)
    monkeypatch.chdir(tmp_path / "elsewhere")
    run(monkeypatch, "--resume", folder)


def test_a_corpus_that_is_gone_on_resume_is_one_line_that_names_it(
    settings, tmp_path, text, monkeypatch
):
    run(monkeypatch, "--config", settings(max_steps=2))
    text.unlink()
    with pytest.raises(InputError, match=r"tale\.txt") as caught:
        run(monkeypatch, "--resume", only_run(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [b"", b"not a save", None])
def test_a_damaged_save_is_one_line_that_names_it(tmp_path, text, damage):
    trainer = trainer_of(tmp_path, text)
    trainer.save()
    path = tmp_path / "run" / "latest.pt"
    path.write_bytes(path.read_bytes()[:-3000] if damage is None else damage)
    with pytest.raises(InputError, match=r"latest\.pt: cannot be read") as caught:
        trainer.restore()
    assert "\n" not in str(caught.value)


def contents(folder):
    """Every file below a folder, and what is in it."""
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("kind", ["a repository", "a quantised run", "another program's"])
@pytest.mark.parametrize("name", ["", ".", "whole path"])
def test_what_is_no_run_is_not_resumed_and_left_as_it_is(
    settings, tmp_path, monkeypatch, kind, name
):
    folder = tmp_path / "work"
    (folder / "shards-12").mkdir(parents=True)
    for file in (
        "log.txt",
        "metrics.jsonl",
        "samples.txt",
        ".half.tmp",
        "shards-12/mine",
        "best_model.safetensors",
    ):
        (folder / file).write_text("mine\n")
    (folder / "config.json").write_bytes(settings().read_bytes())
    if kind == "a quantised run":
        (folder / "tokenizer.json").write_text('{"type": "bytes"}')
    if kind == "another program's":
        (folder / "env.json").write_text('{"PATH": "/bin"}')
    before = contents(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match="resume: ") as caught:
        run(monkeypatch, "--resume", folder if name == "whole path" else name)
    assert "\n" not in str(caught.value) and contents(folder) == before


def test_a_run_that_has_lost_its_save_is_not_begun_anew(trained, tmp_path, monkeypatch):
    folder = trained.copy(tmp_path)
    (folder / "latest.pt").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    # ended, nearly so, and with the lines lost
    for kept in (lines, [line for line in lines if '"result"' not in line], []):
        (folder / "metrics.jsonl").write_text("".join(kept))
        before = contents(folder)
        with pytest.raises(InputError, match=r"no latest\.pt") as caught:
            run(monkeypatch, "--resume", folder)
        assert "\n" not in str(caught.value)
        after = contents(folder)
        assert {name: after[name] for name in before if name.name != "log.txt"} == {
            name: data for name, data in before.items() if name.name != "log.txt"
        }


def test_a_run_stopped_before_its_first_save_begins_anew(trained, tmp_path, monkeypatch):
    folder = trained.copy(tmp_path)
    before, samples = untimed(folder), (folder / "samples.txt").read_text()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:5]))  # four steps and the first evaluation
    (folder / "latest.pt").unlink()
    run(monkeypatch, "--resume", folder)
    assert untimed(folder) == before and (folder / "samples.txt").read_text() == samples


def test_where_saves_go_by_time_the_first_weights_are_saved_with_the_state(
    settings, tmp_path, monkeypatch, trained
):
    """Else a kill before the first save in minutes would leave weights, and nothing to go on
    from."""
    with monkeypatch.context() as patch:
        taken, take_step = [], Trainer.take_step

        def some_steps(self):
            if len(taken) == 6:
                raise MemoryError  # as good as a kill: nothing is saved for it
            taken.append(None)
            return take_step(self)

        patch.setattr(Trainer, "take_step", some_steps)
        with pytest.raises(MemoryError):
            run(monkeypatch, "--config", settings(save_interval=None))
    folder = only_run(tmp_path)
    assert (folder / "best_model.safetensors").exists()
    run(monkeypatch, "--resume", folder)
    assert_same_run(trained.folder, folder)


@pytest.mark.parametrize("end", ["SIGTERM", "a full disk"])
def test_a_start_that_is_stopped_leaves_no_folder(settings, tmp_path, monkeypatch, end):
    def stopped(*arguments, **options):
        assert list((tmp_path / "logs").iterdir())
        if end == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        raise InputError("config.json: cannot be written")

    before = signal.getsignal(signal.SIGTERM)
    if end == "SIGTERM":
        monkeypatch.setattr(train_module, "run_corpus", stopped)
    else:
        monkeypatch.setattr("training.record.save_config", stopped)
    with pytest.raises((SystemExit, InputError)):
        run(monkeypatch, "--config", settings())
    assert not list((tmp_path / "logs").iterdir()) and signal.getsignal(signal.SIGTERM) == before


def wait_at_step(step, reached):
    """Makes this process set `reached` when it begins the step after `step`, and wait there."""
    take_step = Trainer.take_step

    def waiting(self):
        if self.step == step:
            reached.set()
            time.sleep(600)  # until it is killed
        return take_step(self)

    Trainer.take_step = waiting


def test_a_run_that_a_process_trains_is_not_gone_on_with_by_another(
    settings, tmp_path, monkeypatch, capsys
):
    reached = multiprocessing.get_context("fork").Event()
    first = run_in_child("--config", settings(), prepare=lambda: wait_at_step(1, reached))
    assert reached.wait(timeout=60), first.exitcode
    folder = only_run(tmp_path)
    with pytest.raises(InputError) as caught:
        run(monkeypatch, "--resume", folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    first.kill()  # and with the process its lock is gone
    first.join()
    assert (folder / ".lock").exists()
    with Record(folder).locked():
        pass
    assert not (folder / ".lock").exists()


@pytest.mark.parametrize("more", [["--profile"], []])
def test_a_finished_run_keeps_its_result(trained, tmp_path, monkeypatch, capsys, more):
    monkeypatch.setattr("training.profiling.STEPS", 1)
    folder = trained.copy(tmp_path)
    before = contents(folder)
    run(monkeypatch, "--resume", folder, *more)
    after = contents(folder)
    for name in map(Path, ("metrics.jsonl", "best_model.safetensors", "samples.txt")):
        assert after[name] == before[name]
    if not more:
        assert capsys.readouterr().out.splitlines()[-20:] == trained.printed[-20:]


def test_two_runs_of_one_seed_write_the_same_bytes(settings, tmp_path, monkeypatch, trained):
    run(monkeypatch, "--config", settings())
    one, other = contents(trained.folder), contents(only_run(tmp_path))
    assert one.keys() == other.keys()
    for name in map(Path, ("best_model.safetensors", "samples.txt", "tokenizer.json")):
        assert one[name] == other[name], name


def test_a_terminal_that_cannot_show_a_text_loses_nothing(settings, tmp_path, monkeypatch):
    path = settings(max_steps=2, generation_prompt="né 中 ", num_new_tokens=2)
    shown = io.BytesIO()
    # as Python opens it for a terminal whose encoding is ASCII
    terminal = io.TextIOWrapper(shown, encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", terminal)
    run_command(lambda: run(monkeypatch, "--config", path))
    terminal.flush()
    assert b"n? ? " in shown.getvalue() and b"test_bits_per_byte: " in shown.getvalue()
    folder = only_run(tmp_path)
    assert "né 中 " in (folder / "log.txt").read_text(encoding="utf-8")
    assert [line["kind"] for line in untimed(folder)][-1] == "result"


class Hostile:
    """What pickle makes a call of: whoever unpickles it makes the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("parallel", ["none", "fsdp"])
@pytest.mark.parametrize("shards", ["shards-0", 1, "../shards-0"])
def test_nothing_in_a_run_s_folder_is_executed(tmp_path, text, parallel, shards):
    trainer = trainer_of(tmp_path, text, parallel=parallel)
    trainer.save()
    values = torch.load(tmp_path / "run" / "latest.pt", weights_only=True)
    touched = tmp_path / "touched"
    folder = tmp_path / "run" / "shards-0"
    folder.mkdir(exist_ok=True)
    # the first is where torch.distributed.checkpoint reads a pickle
    for name in (".metadata", "0-of-1.safetensors"):
        (folder / name).write_bytes(pickle.dumps(Hostile(touched)))
    torch.save(values | {"shards": shards}, tmp_path / "run" / "latest.pt")
    with pytest.raises(InputError):
        trainer.restore()
    (tmp_path / "run" / "latest.pt").write_bytes(pickle.dumps(Hostile(touched)))
    with pytest.raises(InputError, match="latest.pt"):
        trainer.restore()
    assert not touched.exists()
    pickle.loads(pickle.dumps(Hostile(touched)))
    assert touched.exists(), "the pickle is a hostile one"


def changed(tensors, change):
    """`tensors` with one that is a matrix changed."""
    name = next(key for key, tensor in tensors.items() if tensor.dim() == 2 and tensor.size(0) > 1)
    return tensors | {name: change(tensors[name])}


SAVES_OF_OTHERS = {
    "a weight to broadcast": lambda v: v | {"model": changed(v["model"], lambda t: t[:1])},
    "a weight of another type": lambda v: v | {"model": changed(v["model"], torch.Tensor.double)},
    "a weight that is not finite": lambda v: (
        v | {"model": changed(v["model"], lambda t: t * float("nan"))}
    ),
    "a weight too few": lambda v: v | {"model": dict(list(v["model"].items())[1:])},
    "a weight too many": lambda v: v | {"model": v["model"] | {"more": torch.zeros(1)}},
    "no average": lambda v: v | {"average": {}},
    "an average to broadcast": lambda v: v | {"average": changed(v["average"], lambda t: t[:1])},
    "a state to broadcast": lambda v: v | {"optimizer": changed(v["optimizer"], lambda t: t[:1])},
    "a state of no parameter": lambda v: (
        v | {"optimizer": v["optimizer"] | {"more:sum": torch.zeros(1)}}
    ),
    "a text for a state": lambda v: v | {"optimizer": dict.fromkeys(v["optimizer"], "x")},
    "carried text of another shape": lambda v: (
        v | {"carried": [[{k: t[:1] for k, t in b.items()} for b in v["carried"][0]]]}
    ),
    "too many carried texts": lambda v: v | {"carried": v["carried"] * 2},
    "no step": lambda v: {key: value for key, value in v.items() if key != "step"},
    "a step beyond the run's end": lambda v: v | {"step": 99},
    "no schedule of ours": lambda v: v | {"schedule": {"lr": 0.1}},
    "a length below 0": lambda v: v | {"lengths": {"metrics.jsonl": -1}},
    "another scaler": lambda v: v | {"scaler": {"scale": 1.0}},
    "a list": list,
}


@pytest.mark.parametrize("change", SAVES_OF_OTHERS)
def test_a_save_that_is_not_of_this_run_is_one_line_that_names_it(tmp_path, text, change):
    options = {"ema_decay": 0.5, "decompose_bypass_cross_window": True}
    trainer = trainer_of(tmp_path, text, **options)
    trainer.take_step()
    trainer.save()
    path = tmp_path / "run" / "latest.pt"
    torch.save(SAVES_OF_OTHERS[change](torch.load(path, weights_only=True)), path)
    other = trainer_of(tmp_path, text, **options)
    before = weights(other).clone()
    with pytest.raises(InputError, match=r"latest\.pt") as caught:
        other.restore()
    assert "\n" not in str(caught.value)
    assert torch.equal(weights(other), before)


def test_a_large_token_file_trains_in_memory_of_a_fraction_of_it(tmp_path, text):
    trainer = trainer_of(tmp_path, text)
    path, tokens = tmp_path / "large.tokens", 2**26  # 128 MiB
    # a sparse file: it takes no space on the disk, and reads as zeros
    with open(path, "wb") as file:
        header = {
            "dtype": "uint16",
            "tokens": tokens,
            "bytes": tokens,
            "words": 1,
            "documents": 1,
            "parts": [tokens],
        }
        header |= {
            "scored_bytes": tokens,
            "scored_words": 1,
            "vocab_size": 256,
            "tokenizer": "bytes",
            "key": "",
        }
        zeros = bytes(2**24)
        digest = hashlib.sha256()
        for _ in range(0, 2 * tokens, len(zeros)):
            digest.update(zeros)
        digest.update(bytes(8))
        file.write(
            (FORMAT + json.dumps(header | {"sha256": digest.hexdigest()}).encode()).ljust(
                HEADER_BYTES
            )
        )
        file.truncate(HEADER_BYTES + 2 * tokens + 8)
    trainer.batches = Windows(TokenFile(path), 16, 4, seed=1)
    trainer.take_step()
    before = private_memory()
    starts = set()
    for _ in range(20):
        starts |= set(trainer.batches.starts(trainer.step))
        trainer.take_step()
    assert max(starts) - min(starts) > tokens // 2  # windows from all over the file
    assert private_memory() - before < 2**24


def private_memory():
    """Bytes of this process that are not pages of a file, which the system takes back when it needs
    them."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


def test_a_profile_says_where_the_step_went(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("training.profiling.STEPS", 1)
    run(monkeypatch, "--config", settings(layers=1, levels=1), "--profile")
    folder = only_run(tmp_path)
    table = (folder / "profile.txt").read_text()
    assert all(
        part in table for part in ("data", "forward", "backward", "clipping", "optimizer", "aten::")
    )
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]


def test_a_plan_needs_no_data_and_writes_nothing(settings, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--config", settings(dataset="nowhere.txt", layers=1), "--plan", "2")
    assert "total_gib: " in capsys.readouterr().out
    assert not (tmp_path / "logs").exists()


# ===== Compiled


def compiles_as(monkeypatch, change):
    """Makes torch.compile give the loss itself, with change(model, True) before it and
    change(model, False) after it."""

    def compiled(loss, mode):
        def call(*arguments):
            change(loss.__self__, True)
            result = loss(*arguments)
            change(loss.__self__, False)
            return result

        return call

    monkeypatch.setattr(torch, "compile", compiled)


def test_a_compiled_loss_that_loses_a_gradient_is_not_used(monkeypatch, text, tmp_path):
    def frozen(model, during):
        model.final_ln.weight.requires_grad_(not during)

    compiles_as(monkeypatch, frozen)
    said = []
    monkeypatch.setattr(Record, "say", lambda self, line: said.append(line))
    trainer = trainer_of(tmp_path, text, compile=True)
    assert trainer.loss == trainer.model.loss
    assert said == [
        "not compiled, training goes on without: compiled, final_ln.weight would not learn;"
        " another torch may do it right"
    ]
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("kind", [None, torch.float16])
def test_a_compiled_loss_that_keeps_all_gradients_is_used(monkeypatch, text, tmp_path, kind):
    """In fp16 the gradients of many texts' mean are zero here and there, unless they are scaled,
    where those of one text are not."""
    compiles_as(monkeypatch, lambda model, during: None)
    monkeypatch.setattr("training.trainer.training_type", lambda config, device: kind)
    keys = {"micro_batch_size": 8, "block_size": 256, "C": 64}
    trainer = trainer_of(tmp_path, text, compile=True, **keys)
    assert trainer.loss != trainer.model.loss
