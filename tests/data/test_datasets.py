"""WikiText, books and a blend of both, as parquet in the hub's layout: prepared, trained on and
measured end to end."""

import json
import math
import os
import subprocess
import sys
import time

import pytest
from helpers import ROOT, SMALL, only_run, run

import evaluate as evaluate_module
from config import load_config
from data.prepare import prepare

SOURCES = {  # data set -> what it is made from, characters of each split
    "wikitext-103": ("wikitext/test.txt", 40_000),
    "pg19": ("books/test/the-adventures-of-sherlock-holmes.txt", 40_000),
}


@pytest.fixture
def hub_layout(shared, tmp_path, monkeypatch):
    """A function that writes a data set's first characters as parquet; the data set library works
    in its own folder."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    # where it was imported before
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    import pyarrow
    import pyarrow.parquet

    def write(name):
        source, size = SOURCES[name]
        folder = tmp_path / name / "data"
        folder.mkdir(parents=True)
        text = (shared / "data" / source).read_text(encoding="utf-8")
        for number, split in enumerate(("train", "validation", "test")):
            part = text[number * size : (number + 1) * size]
            rows = (
                ["" if row == " \n" else row for row in part.splitlines(True)]
                if name == "wikitext-103"
                else [part]
            )
            pyarrow.parquet.write_table(
                pyarrow.table({"text": rows}), folder / f"{split}-00000-of-00001.parquet"
            )
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize("name", ["wikitext-103", "pg19", "blend"])
def test_a_data_set_is_prepared_trained_on_and_measured(
    name, hub_layout, tmp_path, monkeypatch, capsys
):
    settings = SMALL | {
        "out_dir": str(tmp_path / "logs"),
        "cache_dir": str(tmp_path / "cache"),
        "max_steps": 4,
    }
    settings |= {"dataset": "wikitext-103" if name == "blend" else name}
    settings |= {"dataset_path": hub_layout(settings["dataset"])}
    if name == "blend":
        settings |= {"dataset_mix": {hub_layout("pg19"): 2.0}}
    if name == "pg19":  # auto: a SentencePiece of its own training split
        settings |= {"tokenizer": "auto", "vocab_size": 400}
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    run(monkeypatch, "--config", tmp_path / "config.json")
    folder = only_run(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--checkpoint", str(folder), "--json"])
    evaluate_module.main()
    result = json.loads(capsys.readouterr().out)
    _, size = SOURCES[settings["dataset"]]
    assert result["bytes"] == pytest.approx(size, rel=0.05)
    assert math.isfinite(result["bits_per_byte"]) and 0 < result["bits_per_byte"] < 12
    assert result["tokenizer"] == ("sentencepiece-400" if name == "pg19" else "bytes")


def test_a_second_start_uses_the_cache_at_once(hub_layout, tmp_path, monkeypatch):
    path = hub_layout("wikitext-103")
    values = SMALL | {
        "dataset": "wikitext-103",
        "dataset_path": path,
        "cache_dir": str(tmp_path / "cache"),
    }
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    config = load_config(tmp_path / "config.json")
    made = []
    first = prepare(config, made.append)
    assert len(made) == 3
    monkeypatch.setattr("data.prepare.documents", lambda *_: pytest.fail("read again"))
    second = prepare(config, made.append)
    assert len(made) == 3
    assert second.test.tokens.tobytes() == first.test.tokens.tobytes()


def test_the_users_caches_are_left_alone(hub_layout, tmp_path):
    theirs = tmp_path / "hf" / "hub" / "theirs"
    theirs.mkdir(parents=True)
    (theirs / "file").write_text("kept")
    config = load_config(
        ROOT / "config.json", dataset="pg19", dataset_path=hub_layout("pg19"), tokenizer="bytes"
    )
    prepare(config.model_copy(update={"cache_dir": str(tmp_path / "cache")}), lambda line: None)
    assert (theirs / "file").read_text() == "kept"
    assert os.environ["HF_HOME"] == str(tmp_path / "hf")


# Prints the most memory that preparing the books takes a process, in MiB.
PREPARE_BOOKS = """
import resource
import sys

from config import Config
from data.prepare import prepare

books, cache = sys.argv[1:]
prepare(Config(dataset=books, tokenizer="sentencepiece", vocab_size=32000, cache_dir=cache))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
"""


@pytest.mark.slow
def test_the_books_are_prepared_in_two_minutes_and_little_memory(shared, tmp_path):
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PREPARE_BOOKS, str(shared / "data/books"), str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert time.perf_counter() - began < 120
    assert float(done.stdout.split()[-1]) < 1536
