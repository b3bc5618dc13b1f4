"""The first implementation's numbers: its checkpoints load and give its logits and losses, in
training too."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import SHARED, run_in_chunks

from checkpoint import load_model
from inference.decode import Decoder

OWN = Path(__file__).parent / "fixtures"  # two networks, which every clone has
# One folder a name: the two of the repository, and those beside it where there are any, of which
# two are the same ones.
ALL = {
    file.parent.name: file.parent
    for place in (SHARED / "fixtures", OWN)
    for file in sorted(place.glob("*/expected.pt"))
}
NETWORKS = [
    pytest.param(path, id=name) for name, path in ALL.items() if not name.startswith("train5_")
]


def expected_of(folder: Path) -> dict:
    return torch.load(folder / "expected.pt", weights_only=True)


@pytest.mark.parametrize("folder", NETWORKS)
def test_logits_and_loss_equal_the_first_implementation_s_whole_and_in_chunks(folder):
    model, _, tokenizer = load_model(folder)
    assert tokenizer is None and not model.training
    expected = expected_of(folder)
    with torch.no_grad():
        logits, _ = model(expected["ids"])
        loss, _ = model.loss(expected["ids"], expected["targets"])
        chunks, _ = run_in_chunks(model, expected["ids"], [1, 2, 13, 1, 31])
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, expected["loss"], atol=1e-5, rtol=0)
    torch.testing.assert_close(chunks, expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("folder", NETWORKS)
def test_the_decoder_s_logits_equal_the_first_implementation_s_too(folder):
    decoder, expected = Decoder(load_model(folder)[0]), expected_of(folder)
    logits, _ = decoder(expected["ids"], last_only=False)
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    steps, _ = run_in_chunks(decoder, expected["ids"][:, :9], [1] * 9)
    torch.testing.assert_close(steps, expected["logits"][:, :9], atol=1e-4, rtol=0)


def test_five_adagrad_steps_equal_the_first_implementation_s(shared):
    folder = shared / "fixtures" / "train5_Adagrad"
    model, _, _ = load_model(folder)
    expected = expected_of(folder)
    optimizer = torch.optim.Adagrad(
        model.train().parameters(), lr=0.01, eps=2e-13, weight_decay=1e-6
    )
    for inputs, targets, lr, wanted in zip(
        *(expected[k] for k in ("inputs", "targets", "lrs", "losses")), strict=True
    ):
        optimizer.param_groups[0]["lr"] = lr
        loss, _ = model.loss(inputs, targets)
        assert abs(loss.item() - wanted) < 1e-3
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    torch.testing.assert_close(
        model.lm_head.weight.detach(), expected["final_lm_head"], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("folder", NETWORKS)
def test_the_expected_loss_is_the_cross_entropy_of_the_expected_logits(folder):
    """Guards the fixtures themselves: a wrong file would make the tests above say nothing."""
    expected = expected_of(folder)
    loss = F.cross_entropy(expected["logits"].flatten(0, 1), expected["targets"].flatten())
    torch.testing.assert_close(loss, expected["loss"], atol=1e-5, rtol=0)


def test_a_clone_has_the_plain_and_the_released_network():
    """Without them the tests above would have no case and pass in silence."""
    assert {path.parent.name for path in OWN.glob("*/expected.pt")} == {"base_plain", "released"}
