"""Our tokenizers in the format of the package tokenizers, which transformers reads.

Each of the three becomes one `tokenizers.Tokenizer` with the same ids for the same text. Special
tokens are read in no text, as our tokenizers read none: their names are spelt out like any text."""

import itertools
import json
import re
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from common.command import InputError
from data.tokenizer import (
    SPACE,
    ByteTokenizer,
    GPT2Tokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

# Texts on which both have to agree before anything is written: spaces of all kinds, line ends,
# scripts, characters of several code points, what looks like special tokens, SentencePiece's ▁.
PROBES = (
    "",
    " ",
    "The history of  two   spaces\n\n\n\tand a tab\r\n    end ",
    "naïve café Å ﬁ 中文 русский 12,345.67 don't I'LL",
    "👩‍👩‍👧 🙂\u2028\0",
    f"{SPACE}a{SPACE}{SPACE} {SPACE}\n{SPACE}",
    "<unk></s><|endoftext|><0x41>",
    "aaaaaaaaaaa          ..........\n\n\n\n\n",
)


def byte_letters() -> list[str]:
    """The printable character by which GPT-2's vocabulary shows each of the 256 bytes: a byte that
    is printable in Latin-1 is that character, the others are those from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    codes = {byte: byte for byte in printable}
    codes |= {byte: 0x100 + i for i, byte in enumerate(others)}
    return [chr(codes[byte]) for byte in range(256)]


def of_bytes() -> tokenizers.Tokenizer:
    """256 bytes, and no merges."""
    vocab = {letter: byte for byte, letter in enumerate(byte_letters())}
    made = tokenizers.Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def merged_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that `token` is merged from: what the merges that come before it leave."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        first = joined.index(min(joined))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


def of_gpt2(tokenizer: GPT2Tokenizer) -> tokenizers.Tokenizer:
    """GPT-2's merges, worked out from the ranks that tiktoken keeps, which are the ids."""
    letters = byte_letters()

    def shown(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    end = tokenizer.end_of_text
    ranks = {tokenizer.decode_bytes([i]): i for i in range(end)}
    pairs = [merged_pair(token, ranks) for token in ranks if len(token) > 1]
    vocab = {shown(token): i for token, i in ranks.items()}
    vocab[tokenizer.decode([end])] = end
    made = tokenizers.Tokenizer(models.BPE(vocab, [(shown(a), shown(b)) for a, b in pairs]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = decoders.ByteLevel()
    return made


def pieces_of(file: bytes) -> tuple[Any, list[str]]:
    """The SentencePiece model in a file's bytes, and its pieces with spaces for ▁."""
    from sentencepiece import sentencepiece_model_pb2  # needs protobuf, which this alone does

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(file)
    kinds = model.SentencePiece
    written = {kinds.NORMAL, kinds.USER_DEFINED}
    names = [
        piece.piece.replace(SPACE, " ") if piece.type in written else piece.piece
        for piece in model.pieces
    ]
    return model, names


def merges_of(model: Any, names: list[str]) -> list[tuple[str, str]]:
    """SentencePiece joins any two neighbours that make a piece, those of the best score first: all
    the ways in which two pieces make a third, in that order."""
    normal = {
        name: piece.score
        for piece, name in zip(model.pieces, names, strict=True)
        if piece.type == model.SentencePiece.NORMAL
    }
    return [
        (name[:i], name[i:])
        for name in sorted(normal, key=normal.__getitem__, reverse=True)
        for i in range(1, len(name))
        if name[:i] in normal and name[i:] in normal
    ]


def of_sentencepiece(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """A SentencePiece model of byte pairs, with its byte fallback.

    Its pieces have spaces in place of SentencePiece's ▁. So spaces need no replacing, and a ▁ in a
    text is no piece but three bytes, as ours reads it."""
    model, names = pieces_of(tokenizer.model)
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        # Of two cuts of a text that are as probable, the packages take different ones.
        raise InputError(
            f"tokenizer: {tokenizer.name} is no SentencePiece of byte pairs; others cannot be"
            " exported"
        )
    vocab = {name: i for i, name in enumerate(names)}
    made = tokenizers.Tokenizer(models.BPE(vocab, merges_of(model, names), byte_fallback=True))
    kinds = model.SentencePiece
    whole = [n for p, n in zip(model.pieces, names, strict=True) if p.type == kinds.USER_DEFINED]
    if whole:  # a piece that no merge crosses
        longest_first = sorted(whole, key=len, reverse=True)
        pattern = Regex("|".join(re.escape(name) for name in longest_first))
        made.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    silent = [p.piece for p in model.pieces if p.type in (kinds.CONTROL, kinds.UNKNOWN)]
    made.decoder = decoders.Sequence([
        *(decoders.Replace(Regex(rf"\A{re.escape(name)}\z"), "") for name in silent),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ])  # fmt: skip
    return made


def check_equal(made: tokenizers.Tokenizer, tokenizer: Tokenizer) -> None:
    """Raises `InputError` where the two read a probe differently."""
    for text in PROBES:
        ids = tokenizer.encode(text)
        if made.encode(text).ids != ids or made.decode(ids) != tokenizer.decode(ids):
            raise InputError(
                f"checkpoint: its tokenizer, {tokenizer.name}, reads {text!r} otherwise than the"
                " same pieces in the package tokenizers; it cannot be exported"
            )


def filler_token(tokenizer: Tokenizer) -> int:
    """The token that stands where there is no text: the one that ends a text, or where there is
    none, as in bytes and our SentencePiece, the zero byte, which is in no text."""
    end = tokenizer.end_of_text
    return tokenizer.encode("\0")[0] if end is None else end


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """The files by which transformers reads text as `tokenizer` does: name -> text. Raises
    `InputError` where that cannot be had."""
    if isinstance(tokenizer, ByteTokenizer):
        made = of_bytes()
    elif isinstance(tokenizer, GPT2Tokenizer):
        made = of_gpt2(tokenizer)
    else:
        made = of_sentencepiece(tokenizer)
    check_equal(made, tokenizer)
    filler = made.id_to_token(filler_token(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",  # a text goes on at its end
        "pad_token": filler,
        "eos_token": filler,  # which other programs expect every tokenizer to have
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": made.to_str(pretty=False),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False),
    }
