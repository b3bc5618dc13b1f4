"""The figures of evaluate.py: every token once, any batch size, against a plain computation written
apart from it."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from helpers import random_model, save_byte_run, tiny

import evaluate
import quantize
from common.command import InputError
from config import load_config, save_config
from data.prepare import original_text, read_tokens, run_corpus
from data.tokenizer import ByteTokenizer
from inference import scoring
from inference.scoring import bigram_nats, figures, score
from layers.state import State


class Uniform(torch.nn.Module):
    """Gives every token the same probability, and counts what it is asked for."""

    vocab_size = 7

    def start(self, rows, stream):
        return State([])

    def forward(self, ids, state):
        return torch.zeros(*ids.shape, self.vocab_size), state


@pytest.mark.parametrize("context", ["stream", "window"])
@pytest.mark.parametrize("length", [2, 3, 9, 10, 11, 16, 17, 63, 64, 65, 100])
@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 8), (8, 1), (16, 5), (200, 100)])
def test_every_token_but_the_first_is_scored_once(monkeypatch, context, length, window, stride):
    monkeypatch.setattr(scoring, "LOGITS_AT_A_TIME", 7 * 24)
    tokens = np.arange(length, dtype=np.uint16) % 7
    nats = score(Uniform(), tokens, window, stride, context)
    assert nats == pytest.approx((length - 1) * math.log(7))


def plain_nats(model, tokens, window, stride):
    """Position by position: the window that scores it is the first that holds it."""
    total, scored, start = 0.0, 0, 0
    while scored < len(tokens) - 1:
        ids = torch.tensor([tokens[start : start + window]])
        log_p = torch.log_softmax(model(ids)[0][0].double(), dim=-1)
        for t in range(ids.size(1)):
            target = start + t + 1
            if target > scored and target < len(tokens):
                total -= log_p[t, tokens[target]].item()
                scored = target
        start += stride
    return total


@pytest.mark.parametrize(("window", "stride"), [(32, 16), (32, 32), (20, 7)])
def test_window_nats_equal_a_plain_loop_on_real_text(shared, window, stride):
    text = (shared / "data/wikitext/test.txt").read_text(encoding="utf-8")[:1500]
    tokens = list(text.encode())
    model = random_model_of_bytes()
    with torch.no_grad():
        expected = plain_nats(model, tokens, window, stride)
    assert score(model, np.array(tokens), window, stride, "window") == pytest.approx(
        expected, rel=1e-5
    )


def test_stream_nats_equal_one_pass_over_the_whole_text(shared, monkeypatch):
    tokens = np.frombuffer((shared / "data/wikitext/test.txt").read_bytes()[:1500], np.uint8)
    model = random_model_of_bytes()
    with torch.no_grad():
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        logits, _ = model(ids[:, :-1], model.start(1, stream=True))
        expected = torch.nn.functional.cross_entropy(
            logits[0].double(), ids[0, 1:], reduction="sum"
        ).item()
    for size in (256 * 16, 256 * 100):
        monkeypatch.setattr(scoring, "LOGITS_AT_A_TIME", size)
        assert score(model, tokens, 32, 16, "stream") == pytest.approx(expected, rel=1e-6)


def random_model_of_bytes():
    from helpers import randomised

    from model import build_model

    torch.manual_seed(0)
    return randomised(build_model(tiny(), 256)).eval()


def test_the_batch_size_has_no_bearing_on_the_figures(monkeypatch):
    model, tokens = random_model(tiny()), np.random.default_rng(0).integers(0, 50, 500)
    results = []
    for size in (1, 50 * 32 * 3, 2**24):
        monkeypatch.setattr(scoring, "LOGITS_AT_A_TIME", size)
        results.append(score(model, tokens, 32, 16, "window"))
    assert results == pytest.approx([results[0]] * 3, rel=1e-6)


def test_wikitext_test_has_its_published_number_of_words(shared):
    text = read_tokens(str(shared / "data/wikitext/test.txt"), tiny(), ByteTokenizer(), print)
    assert text.words == 245_569  # its first token is a space, so no word is left out
    assert text.size == (shared / "data/wikitext/test.txt").stat().st_size - 1


def test_the_original_text_is_its_rows_joined_by_blank_lines(shared):
    rows = ["", " = One = \n", "", " a .\n", " b .\n"]  # as the hub stores them
    verbatim = "".join(row or " \n" for row in rows)
    assert original_text(verbatim) == "\n\n".join(rows)
    text = (shared / "data/wikitext/test.txt").read_text(encoding="utf-8")
    # The raw split's 1,290,590 bytes become 1,296,370; this file has the same rows, with rare words
    # as <unk>.
    assert len(original_text(text).encode()) - len(text.encode()) == 1_296_370 - 1_290_590


def test_the_original_protocol_has_its_own_name_and_settings(tmp_path, monkeypatch, capsys):
    model = random_model_of_bytes()
    save_byte_run(model.config, tmp_path)  # of the same weights
    text = " \n = Title = \n \n Some words .\n" * 20
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    asked = ("--data", str(tmp_path / "text.txt"), "--protocol", "original")
    result, _ = evaluation(monkeypatch, capsys, tmp_path, *asked)
    expected = np.array(list(original_text(text).encode()))
    assert (result["protocol"], result["window"], result["stride"]) == ("original", 256, 128)
    assert result["tokens"] == len(expected) - 1
    assert result["nats"] == pytest.approx(score(model, expected, 256, 128, "window"), rel=1e-6)
    with pytest.raises(InputError, match="protocol"):
        evaluation(monkeypatch, capsys, tmp_path, *asked, "--stride", "64")


def test_figures_are_in_their_units():
    values = figures(nats=1000 * math.log(2), tokens=501, size=2000, words=100)
    assert values["bits_per_byte"] == pytest.approx(0.5)
    assert values["token_perplexity"] == pytest.approx(4.0)
    assert values["word_perplexity"] == pytest.approx(2.0**10)


def test_bigram_nats_equal_the_formula():
    train, tokens = np.array([0, 1, 0, 1, 2, 0]), np.array([0, 1, 2])
    single = {0: 3, 1: 2, 2: 1}
    pairs = {(0, 1): 2, (1, 2): 1}

    def nats(k):
        terms = [
            (pairs[a, b] + k * (single[b] + 1) / (6 + 3)) / (single[a] + k)
            for a, b in ((0, 1), (1, 2))
        ]
        return -sum(map(math.log, terms)) / 2

    assert bigram_nats(train, tokens, 3) == pytest.approx(min(nats(2.0**i) for i in range(-2, 14)))


def test_the_command_prints_the_promised_json(tmp_path, monkeypatch, capsys):
    model = random_model_of_bytes()
    save_byte_run(model.config, tmp_path)  # of the same weights
    (tmp_path / "text.txt").write_text(
        "Some läng text, for the byte tokenizer.\n" * 20, encoding="utf-8"
    )
    asked = ("--data", str(tmp_path / "text.txt"))
    result, _ = evaluation(monkeypatch, capsys, tmp_path, *asked)
    size = (tmp_path / "text.txt").stat().st_size
    assert (result["bytes"], result["tokens"], result["words"]) == (size - 1, size - 1, 8 * 20)
    assert result["bits_per_byte"] == pytest.approx(result["nats"] / math.log(2) / (size - 1))
    assert (result["text"], result["between_documents"]) == (str(tmp_path / "text.txt"), "nothing")
    assert result["tokenizer"] == "bytes"
    assert {"token_perplexity", "word_perplexity", "window", "stride"} <= result.keys()
    (tmp_path / "text.html").write_text("<p>a</p>")
    with pytest.raises(InputError, match=r"text\.html: .*unknown kind"):
        evaluation(monkeypatch, capsys, tmp_path, "--data", str(tmp_path / "text.html"))
    for extra in (["--window", "0"], ["--stride", "33"], ["--data", "nowhere"]):
        with pytest.raises(InputError, match=extra[0][2:]):
            evaluation(monkeypatch, capsys, tmp_path, *asked, *extra)


class Twos(torch.nn.Module):
    """Two bits for every token, whatever it is."""

    vocab_size = 4

    def start(self, rows, stream):
        return State([])

    def forward(self, ids, state):
        return torch.zeros(*ids.shape, self.vocab_size), state


@pytest.mark.parametrize("text", ["ab", "the ", "éa", "one two\n"])
def test_bits_per_byte_are_those_of_the_bytes_that_are_scored(text, tmp_path):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    read = read_tokens(str(tmp_path / "a.txt"), tiny(), ByteTokenizer(), print)
    nats = score(Twos(), read.tokens % 4, 32, 16, "stream")
    assert figures(nats, len(read.tokens), read.size, read.words)["bits_per_byte"] == pytest.approx(
        2.0
    )


@pytest.fixture
def trained(tmp_path):
    """A run's folder over bytes, of three splits with two files each, none of which ends with a
    line end."""
    for name in ("train", "validation", "test"):
        (tmp_path / "text" / name).mkdir(parents=True)
        for part in ("a", "b"):
            (tmp_path / "text" / name / f"{part}.txt").write_text(
                f"{name} {part}, and some more", encoding="utf-8"
            )
    config = tiny(
        dataset=str(tmp_path / "text"), cache_dir=str(tmp_path / "cache"), tokenizer="bytes"
    )
    (tmp_path / "run").mkdir()
    save_byte_run(config, tmp_path / "run")
    run_corpus(config, tmp_path / "run", False, lambda line: None)
    return tmp_path / "run"


def evaluation(monkeypatch, capsys, folder, *options):
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", "--checkpoint", str(folder), "--json", *options]
    )
    evaluate.main()
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_evaluation_says_which_text_it_scored_and_if_it_is_the_runs(
    trained, tmp_path, monkeypatch, capsys
):
    size = len("test a, and some more\n\ntest b, and some more")
    result, error = evaluation(monkeypatch, capsys, trained)
    assert result["protocol"] == "separated"
    assert result["text"] == f"{tmp_path / 'text'} (6 files, 140 bytes), test"
    assert (result["text_of_the_run"], result["between_documents"], result["bytes"]) == (
        True,
        "a blank line",
        size - 1,
    )
    assert "note" not in error
    result, error = evaluation(monkeypatch, capsys, trained, "--protocol", "verbatim")
    assert (result["protocol"], result["between_documents"], result["bytes"]) == (
        "verbatim",
        "nothing",
        size - 3,
    )
    assert result["text_of_the_run"] is None and "note" not in error
    (tmp_path / "text" / "test" / "a.txt").write_text("edited")
    result, error = evaluation(monkeypatch, capsys, trained)
    assert (
        result["text_of_the_run"] is False
        and "the test split is not the one that this run was made with" in error
    )
    (trained / "data.json").unlink()
    result, _ = evaluation(monkeypatch, capsys, trained)
    assert (result["text_of_the_run"], result["between_documents"]) == (None, "nothing")
    assert result["bytes"] == len("edited" + "test b, and some more") - 1


def test_a_split_is_encoded_by_the_runs_own_tokenizer_whatever_its_source_would_make(
    trained, tmp_path, monkeypatch, capsys
):
    config = load_config(trained / "config.json").model_copy(
        update={"tokenizer": "sentencepiece", "vocab_size": 300}
    )
    # a SentencePiece trained now would have other tokens
    save_config(config, trained / "config.json")
    result, _ = evaluation(monkeypatch, capsys, trained)
    assert result["tokenizer"] == "bytes" and result["text_of_the_run"] is True
    assert result["tokens"] == result["bytes"]


def test_a_quantised_run_reads_the_text_that_the_run_does(trained, tmp_path, monkeypatch, capsys):
    arguments = [
        "quantize.py",
        "--checkpoint",
        str(trained),
        "--bits",
        "8",
        "--out",
        str(tmp_path / "small"),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    quantize.main()
    capsys.readouterr()
    keys = ("text", "text_of_the_run", "between_documents", "bytes")
    whole, small = (
        evaluation(monkeypatch, capsys, folder)[0] for folder in (trained, tmp_path / "small")
    )
    assert [small[key] for key in keys] == [whole[key] for key in keys]
