"""Token features: what they say of a text, that training fills them, and that they are a part of a
checkpoint."""

import pytest
import torch
from helpers import random_ids, tiny

from checkpoint import load_model, save_model
from config import save_config
from data.tokenizer import ByteTokenizer
from inference.decode import Decoder
from layers.features import NAMES, features_of, fill_features, token_features
from model import build_model


def names_of(text: str) -> set[str]:
    return {name for name, has in zip(NAMES, features_of(text), strict=True) if has}


def test_features_of_a_word():
    assert names_of(" Bears") == {
        "begins with a space", "begins with a capital", "is letters", "is 5 long", "first letter b",
        "last letter s",
        "ends in s", *(f"has letter {c}" for c in "bears"),
    }  # fmt: skip
    assert names_of("ING") >= {"is all capitals", "is 3 long"} and "ends in ing" not in names_of(
        "ING"
    )
    assert names_of("\n") == {"has a line end", "is space alone"}
    assert names_of("1815") == {"is digits", "is 4 long"} and names_of("é,") == {
        "is not ASCII",
        "is 2 long",
    }
    assert names_of("") == {"is space alone"}


def test_each_name_is_one_features():
    assert len(set(NAMES)) == len(NAMES) == len(features_of("bears"))


def test_a_row_is_of_length_one():
    basis = token_features(ByteTokenizer())
    assert basis.shape == (256, len(NAMES))
    assert basis.norm(dim=1) == pytest.approx(torch.ones(256))


@pytest.mark.parametrize("tied", [False, True])
def test_features_are_filled_saved_and_decoded(tied, tmp_path):
    config = tiny(token_features=True, tie_embedding_to_lm_head=tied)
    model, ids = build_model(config, 256).eval(), random_ids(2, 9)
    # without features there are no numbers, rather than wrong ones
    assert model(ids)[0].isnan().all()
    fill_features(model, ByteTokenizer())
    torch.nn.init.normal_(model.token_embedding.feature_map)
    with torch.no_grad():
        expected, _ = model(ids)
    assert expected.isfinite().all()
    save_model(model, tmp_path / "best_model.safetensors")
    save_config(config, tmp_path / "config.json")
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)[0](ids)[0], expected)
    torch.testing.assert_close(
        Decoder(model)(ids, last_only=False)[0], expected, atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(model.token_embedding(ids), model.token_embedding.whole()[ids])


def test_words_that_look_alike_are_near_each_other():
    basis = torch.nn.functional.normalize(
        torch.tensor([features_of(text) for text in (" walking", " talking", "1815")])
    )
    assert basis[0] @ basis[1] > 0.6 > 0.1 > basis[0] @ basis[2]
