"""Text to token ids and back, exactly: UTF-8 bytes, GPT-2's byte pairs (tiktoken), or
SentencePiece.

The three classes have the same attributes and methods: `name`; `vocab_size`; `fingerprint`, that of
all that decides the ids; `end_of_text`, the id that ends a document, None where there is none;
`spaced`, whether a word's token begins with the space before it; `encode(text)`, verbatim, without
special tokens; `decode_bytes(ids)`, the exact UTF-8; `decode(ids)`, the text, U+FFFD for what is no
UTF-8; `save(folder)`."""

import codecs
import difflib
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random

from common.command import InputError
from common.files import check_regular, read_json, write_whole
from config import Config
from data.corpus import source_kind

SPACE = "▁"  # U+2581, by which SentencePiece stores a space


class ByteTokenizer:
    """The UTF-8 bytes themselves."""

    name = "bytes"
    vocab_size = 256
    fingerprint = "bytes"
    end_of_text = None
    spaced = False

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(ids)

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        write_whole(folder / "tokenizer.json", json.dumps({"type": "bytes"}).encode())


class GPT2Tokenizer:
    """GPT-2's 50,257 byte pairs, whose merges tiktoken downloads once and caches."""

    name = "gpt2"
    fingerprint = "gpt2"
    spaced = True

    def __init__(self):
        import tiktoken

        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # no network, or a broken cached file
            raise InputError(
                f"tokenizer: GPT-2's merges cannot be loaded ({type(error).__name__}); go online"
                " once, point TIKTOKEN_CACHE_DIR at a folder that has them, or take tokenizer"
                " bytes or sentencepiece"
            ) from error
        self.vocab_size = self._encoding.n_vocab
        self.end_of_text = self._encoding.eot_token

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return self._encoding.decode_bytes(ids)

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        write_whole(folder / "tokenizer.json", json.dumps({"type": "gpt2"}).encode())


class SentencePieceTokenizer:
    """A SentencePiece model that can write any text: byte fallback, no normalisation, no added or
    removed spaces. `exact` false takes one that changes text, too, for weights that were trained
    with it; `changes` is then such a text, else None.

    SentencePiece itself reads the character ▁ as a space. Here ▁ in a text becomes its three byte
    pieces instead."""

    spaced = True

    def __init__(self, model: bytes, source: str = "tokenizer", exact: bool = True):
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{source}: is no SentencePiece model; give a .model file") from error
        self.model = model  # the .model file's bytes
        self.vocab_size = self._processor.get_piece_size()
        self.name = f"sentencepiece-{self.vocab_size}"
        self.fingerprint = hashlib.sha256(model).hexdigest()
        end = self._processor.eos_id()  # -1 where the model was trained without one, as ours are
        self.end_of_text = end if end >= 0 else None
        self._bytes = []  # id -> its UTF-8
        for token in range(self.vocab_size):
            piece = self._processor.id_to_piece(token)
            special = self._processor.is_control(token) or self._processor.is_unknown(token)
            if self._processor.is_byte(token):
                self._bytes.append(bytes([int(piece[3:5], 16)]))  # <0x0A>
            else:
                self._bytes.append(b"" if special else piece.replace(SPACE, " ").encode())
        byte_ids = {self._bytes[i]: i for i in range(self.vocab_size) if self._processor.is_byte(i)}
        self._space_ids = [byte_ids.get(bytes([byte]), 0) for byte in SPACE.encode()]
        probes = ("a  b\n\n\tc\r\n ", " d", "é\u2028ﬁ Å 中\0", f"{SPACE}{SPACE} {SPACE}<unk></s>")
        changed = [text for text in probes if self.decode_bytes(self.encode(text)) != text.encode()]
        self.changes = changed[0] if changed else None
        if exact and changed:
            raise InputError(
                f"{source}: does not keep {changed[0]!r} as it is; give a model trained with"
                " byte_fallback, normalization_rule_name=identity, add_dummy_prefix=false and"
                " remove_extra_whitespaces=false"
            )

    def encode(self, text: str) -> list[int]:
        ids = []
        for index, part in enumerate(text.split(SPACE)):
            if index > 0:
                ids += self._space_ids
            ids += self._processor.encode(part)
        return ids

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join([self._bytes[token] for token in ids])

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        # The .json comes last: where it is, the model is whole.
        write_whole(folder / "tokenizer.model", self.model)
        values = {
            "type": "sentencepiece",
            "vocab_size": self.vocab_size,
            "sha256": self.fingerprint,
        }
        if self.changes is not None:
            values["exact"] = False
        write_whole(folder / "tokenizer.json", json.dumps(values).encode())


GPT2_TOKENS = 50257
Tokenizer = ByteTokenizer | GPT2Tokenizer | SentencePieceTokenizer


def tokenizer_choice(config: Config) -> str:
    """`config.tokenizer` without auto: "bytes", "gpt2", "sentencepiece" or the path of a .model
    file."""
    choice = config.tokenizer
    if choice == "auto":
        if config.dataset == "pg19":
            return "sentencepiece"
        return "gpt2" if source_kind(config) == "hub" else "bytes"
    if choice in ("bytes", "gpt2", "sentencepiece"):
        return choice
    if choice.endswith(".model") or Path(choice).exists():
        check_regular(Path(choice))
        return choice
    near = difflib.get_close_matches(choice, ["auto", "bytes", "gpt2", "sentencepiece"], n=1)
    hint = (
        f"did you mean {near[0]}?"
        if near
        else "known are auto, bytes, gpt2, sentencepiece and .model files"
    )
    raise InputError(f"tokenizer: unknown tokenizer {choice}; {hint}")


def planned_vocab_size(config: Config) -> int:
    """The vocabulary that the tokenizer of `config` will have, worked out without making it where
    that takes data."""
    choice = tokenizer_choice(config)
    known = {
        "bytes": ByteTokenizer.vocab_size,
        "gpt2": GPT2_TOKENS,
        "sentencepiece": config.vocab_size,
    }
    return (
        known[choice]
        if choice in known
        else SentencePieceTokenizer(Path(choice).read_bytes(), choice).vocab_size
    )


def make_tokenizer(config: Config, texts: Callable[[], Iterator[str]]) -> Tokenizer:
    """The tokenizer that `config` asks for; `texts()` streams the training split, read only to
    train SentencePiece."""
    choice = tokenizer_choice(config)
    if choice == "bytes":
        return ByteTokenizer()
    if choice == "gpt2":
        return GPT2Tokenizer()
    if choice == "sentencepiece":
        return SentencePieceTokenizer(train_sentencepiece(texts(), config.vocab_size))
    try:
        return SentencePieceTokenizer(Path(choice).read_bytes(), choice)
    except OSError as error:
        raise InputError(
            f"tokenizer: {choice} cannot be read ({error.strerror}); give a .model file"
        ) from None


def named_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that a command's --tokenizer names: bytes, gpt2, or a SentencePiece .model
    file, which may change text. Raises `InputError` for any other name."""
    if name == "bytes":
        return ByteTokenizer()
    if name == "gpt2":
        return GPT2Tokenizer()
    path = Path(name)
    if not path.exists():
        near = difflib.get_close_matches(name, ["bytes", "gpt2"], n=1)
        hint = f"did you mean {near[0]}?" if near else "give bytes, gpt2 or a .model file"
        raise InputError(f"tokenizer: there is no {name}; {hint}")
    check_regular(path)
    return SentencePieceTokenizer(path.read_bytes(), name, exact=False)


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer saved in `folder`; None where there is no tokenizer.json. Raises `InputError`
    for a broken one."""
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        return None
    values = read_json(path)
    if values.get("type") == "bytes":
        return ByteTokenizer()
    if values.get("type") == "gpt2":
        return GPT2Tokenizer()
    if values.get("type") != "sentencepiece":
        raise InputError(
            f"{path}: unknown type {values.get('type')}; known are bytes, gpt2 and sentencepiece"
        )
    model = path.with_suffix(".model")
    check_regular(model)
    try:
        exact = values.get("exact", True) is not False
        tokenizer = SentencePieceTokenizer(model.read_bytes(), str(model), exact)
    except OSError as error:
        raise InputError(
            f"{model}: cannot be read ({error.strerror}); it belongs beside {path.name}"
        ) from None
    if tokenizer.fingerprint != values.get("sha256"):
        raise InputError(f"{model}: is not the model that {path.name} was saved with; restore it")
    return tokenizer


# Pieces of about 1,000 characters that a SentencePiece is learned from at the most: learning takes
# a few times their memory.
MOST_PIECES = 100_000


def train_sentencepiece(texts: Iterator[str], vocab_size: int) -> bytes:
    """The bytes of a byte-pair SentencePiece model with `vocab_size` tokens. The same text gives
    the same model. Raises `InputError` where the text has too few different pieces for
    `vocab_size`, or too many characters."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=map(bytes.decode, _drawn(_sentences(texts), MOST_PIECES)),
            model_writer=model,
            model_type="bpe",  # a tenth of unigram's training time, and 2% fewer tokens on novels
            vocab_size=vocab_size,
            byte_fallback=True,  # every text can be written
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,  # indentation is a token or two
            # a line end is always a token of its own, so text can be cut at it
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            character_coverage=0.9999,
            max_sentence_length=1 << 20,  # none is left out
            # All that it is given: it would draw other pieces each time. Their order is of no
            # consequence.
            input_sentence_size=MOST_PIECES,
            shuffle_input_sentence=True,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if bound := re.search(r"Please set it to a value <= (\d+)", str(error)):
            raise InputError(
                f"vocab_size: {vocab_size} is too many for this text; at most {bound[1]}"
            ) from None
        if bound := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise InputError(
                f"vocab_size: {vocab_size} is too few for this text; at least {bound[1]}"
            ) from None
        raise InputError(
            f"vocab_size: SentencePiece cannot learn from this text ({error}); give more text"
        ) from error
    return model.getvalue()


def _sentences(texts: Iterator[str]) -> Iterator[str]:
    """Cuts text into sentences of about 1 KiB, at spaces where there are some."""
    rest = ""
    for text in texts:
        rest += text
        start = 0
        while len(rest) - start > 1024:
            space = rest.rfind(" ", start + 512, start + 1024)
            end = space if space >= 0 else start + 1024
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def _drawn(pieces: Iterable[str], most: int) -> list[bytes]:
    """`most` of the pieces in UTF-8, each as likely as any other (algorithm R of Vitter, "Random
    sampling with a reservoir", 1985), and the same ones whenever it is called; all where there are
    no more."""
    random = Random(0)
    # Bytes, since a text with one wide character takes two or four bytes for each that it has.
    kept: list[bytes] = []
    for n, piece in enumerate(pieces):
        if n < most:
            kept.append(piece.encode())
        else:
            # Of its methods Python promises of this one alone that its numbers stay the same.
            place = int(random.random() * (n + 1))
            if place < most:
                kept[place] = piece.encode()
    return kept


def text_bytes(tokenizer: Tokenizer, ids: list[int]) -> int:
    """The UTF-8 bytes of the text that `ids` stand for. An end of text stands for none, whatever it
    is written as."""
    return len(tokenizer.decode_bytes([token for token in ids if token != tokenizer.end_of_text]))


class TextStream:
    """Turns ids that come one at a time into text, in whole characters: all pieces joined equal
    `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that are complete now: maybe none, if `token` ends inside one."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """The end: U+FFFD where a character was left incomplete, else nothing."""
        return self._decoder.decode(b"", final=True)
