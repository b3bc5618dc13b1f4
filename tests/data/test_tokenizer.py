"""Tokenizers keep every text, and text streamed token by token is the text decoded at once."""

import json
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from common.command import InputError
from config import Config
from data import tokenizer as tokenizer_module
from data.tokenizer import (
    ByteTokenizer,
    GPT2Tokenizer,
    SentencePieceTokenizer,
    TextStream,
    load_tokenizer,
    make_tokenizer,
    tokenizer_choice,
    train_sentencepiece,
)

TEXT = (
    "The wavelet sees the past, and the past alone.\n  It lifts, predicts,\tupdates: été, naïve,"
    " 中文.\r\n" * 20
)
TRICKY = "  a\n\n\tb\r\n ▁ <unk> \u2028é▁▁ <0x0A></s>\0 \ufeff e\u0301 ﬁ 𝄞 \u3000 "


@pytest.fixture(scope="module")
def trained():
    return SentencePieceTokenizer(train_sentencepiece(iter([TEXT]), 340))


@pytest.fixture
def every(trained, gpt2_or_none):
    return [ByteTokenizer(), trained] + ([gpt2_or_none] if gpt2_or_none else [])


@pytest.fixture(scope="module")
def gpt2_or_none():
    cache = SHARED / "tiktoken"
    with pytest.MonkeyPatch.context() as patch:
        if cache.is_dir():
            patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        try:
            return GPT2Tokenizer()
        except InputError:
            return None


def test_tricky_text_comes_back_byte_for_byte(every):
    for tokenizer in every:
        ids = tokenizer.encode(TRICKY)
        assert tokenizer.decode_bytes(ids) == TRICKY.encode(), tokenizer.name
        assert tokenizer.decode(ids) == TRICKY
        assert all(0 <= token < tokenizer.vocab_size for token in ids)


@settings(max_examples=200, deadline=None)
@given(
    st.text(
        st.sampled_from("ab the▁ \n\r\t<unk>é中𝄞\u2028\0.")
        | st.characters(exclude_categories=["Cs"])
    )
)
def test_any_text_comes_back_byte_for_byte_from_sentencepiece(trained, text):
    assert trained.decode_bytes(trained.encode(text)) == text.encode()


def test_gpt2_has_its_known_ids(gpt2_or_none):
    if gpt2_or_none is None:
        pytest.skip("GPT-2's merges are not cached and there is no network")
    assert gpt2_or_none.vocab_size == 50257
    assert gpt2_or_none.encode("Hello world\n") == [15496, 995, 198]
    # Text that spells a special token is text, not that token.
    assert 50256 not in gpt2_or_none.encode("<|endoftext|>")


def test_streamed_text_has_whole_characters_and_equals_decode(every):
    for tokenizer in every:
        ids = tokenizer.encode(TRICKY)
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in ids] + [stream.flush()]
        assert "".join(pieces) == TRICKY
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 255)))
def test_streamed_bytes_that_are_no_utf8_equal_decode(ids):
    stream = TextStream(ByteTokenizer())
    assert "".join(
        [stream.push(token) for token in ids]
    ) + stream.flush() == ByteTokenizer().decode(ids)


def test_saved_tokenizer_loads_as_the_same(every, tmp_path):
    assert load_tokenizer(tmp_path) is None
    for tokenizer in every:
        folder = tmp_path / tokenizer.name
        folder.mkdir()
        tokenizer.save(folder)
        if tokenizer.name == "gpt2":
            continue  # loads the cached merges again; covered by the file that it wrote
        loaded = load_tokenizer(folder)
        assert (loaded.name, loaded.vocab_size, loaded.fingerprint) == (
            tokenizer.name,
            tokenizer.vocab_size,
            tokenizer.fingerprint,
        )
        assert loaded.encode(TRICKY) == tokenizer.encode(TRICKY)
        assert not list(folder.glob("*.tmp-*"))
    assert json.loads((tmp_path / "bytes" / "tokenizer.json").read_text()) == {"type": "bytes"}


def test_the_same_text_trains_the_same_model_however_it_is_cut(trained):
    again = train_sentencepiece(iter([TEXT[:7], TEXT[7:3000], TEXT[3000:]]), 340)
    assert SentencePieceTokenizer(again).fingerprint == trained.fingerprint


def test_another_process_learns_the_same_model_from_a_part_of_a_text():
    """SentencePiece draws that part by a seed that is another one in each process."""
    code = (
        "import hashlib, random, data.tokenizer as t; t.MOST_PIECES = 200;"
        " letters = random.Random(0).choices('abcdefgh ', k=400_000);"
        " print(hashlib.sha256(t.train_sentencepiece(iter([''.join(letters)]), 400)).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    assert len(found) == 1
    assert len(found.pop()) == 65


def test_pieces_are_drawn_from_the_whole_text():
    drawn = [int(piece) for piece in tokenizer_module._drawn(map(str, range(20_000)), 1000)]
    assert len(set(drawn)) == 1000
    # of each fifth about 200; 60 is some five standard deviations
    counts, _ = np.histogram(drawn, bins=5, range=(0, 20_000))
    assert all(abs(count - 200) < 60 for count in counts)
    assert tokenizer_module._drawn(iter("abé"), 3) == [b"a", b"b", "é".encode()]


def test_a_line_end_is_always_a_token_of_its_own(trained):
    assert trained.encode("a\nb") == trained.encode("a") + trained.encode("\n") + trained.encode(
        "b"
    )
    assert len(trained.encode("\n\n\n")) == 3


def test_a_vocabulary_out_of_reach_names_the_bound():
    with pytest.raises(
        InputError, match=r"vocab_size: 30000 is too many for this text; at most \d+"
    ):
        train_sentencepiece(iter([TEXT]), 30000)
    with pytest.raises(InputError, match=r"vocab_size: 262 is too few for this text; at least \d+"):
        train_sentencepiece(iter([TEXT]), 262)
    with pytest.raises(InputError, match="vocab_size"):
        train_sentencepiece(iter([]), 300)


def test_a_broken_saved_tokenizer_is_one_clear_error(trained, tmp_path):
    trained.save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"rubbish")
    with pytest.raises(InputError, match="is no SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(iter([TEXT]), 341))
    with pytest.raises(InputError, match="is not the model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(InputError, match=r"tokenizer.model: cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"type": "bpe"}')
    with pytest.raises(InputError, match="unknown type bpe"):
        load_tokenizer(tmp_path)


def test_a_model_that_changes_text_is_refused(tmp_path):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=34, minloglevel=2
    )
    path = tmp_path / "lossy.model"
    path.write_bytes(model.getvalue())
    with pytest.raises(InputError, match=r"lossy.model: does not keep .*byte_fallback"):
        make_tokenizer(Config(tokenizer=str(path)), lambda: iter([]))


def test_a_model_file_is_taken_as_it_is(trained, tmp_path):
    trained.save(tmp_path)
    taken = make_tokenizer(Config(tokenizer=str(tmp_path / "tokenizer.model")), lambda: iter([]))
    assert taken.fingerprint == trained.fingerprint
    with pytest.raises(InputError, match="cannot be read"):
        make_tokenizer(Config(tokenizer=str(tmp_path / "none.model")), lambda: iter([]))


def test_auto_follows_the_data_set(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for dataset, choice in [
        ("wikitext-103", "gpt2"),
        ("openwebtext", "gpt2"),
        ("pile-arxiv", "gpt2"),
        ("pg19", "sentencepiece"),
        ("pydoc", "bytes"),
        (str(tmp_path / "a.txt"), "bytes"),
    ]:
        assert tokenizer_choice(Config(dataset=dataset)) == choice
    with pytest.raises(InputError, match="tokenizer: unknown tokenizer gpt-2; did you mean gpt2?"):
        tokenizer_choice(Config(tokenizer="gpt-2"))


def test_gpt2_without_cache_or_network_says_what_to_do(tmp_path, monkeypatch):
    import tiktoken.load
    import tiktoken.registry

    def offline(*_):
        raise ConnectionError("no network")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", offline)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(InputError, match="tokenizer: .*TIKTOKEN_CACHE_DIR"):
        GPT2Tokenizer()
