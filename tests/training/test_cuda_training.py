"""Training on a GPU: the step as a CUDA graph, resume, and the optimizers there. Skipped without a
GPU.

pytest -m cuda
"""

import copy

import pytest
import torch
from helpers import new_trainer, random_ids, random_model, tiny

from common.command import InputError
from config import make_config
from layers.loss import linear_cross_entropy
from training.optimizers import make_optimizers
from training.trainer import EAGER_STEPS, Trainer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
OPTIMIZERS = ["Adagrad", "AdamW", "Muon", "SGD"]
NETWORK = {"C": 32, "layers": 2, "levels": 3, "mlp_expansion": 2, "block_size": 32,
           "pkm_num_keys": 64, "pkm_top_k": 4,
           "fwpkm_enabled": False, "per_scale_mixer_widths": None, "tokenizer": "bytes",
           "recall_heads": 2,
           "recall_dim": 8, "ngram_slots": 50, "ngram_width": 8}  # fmt: skip


def trainer_of(tmp_path, **overrides) -> Trainer:
    text = tmp_path / "tale.txt"
    if not text.exists():
        text.write_text(
            "".join(f"Once upon a time {i} men went {i * i} miles.\n" for i in range(2000)),
            encoding="utf-8",
        )
    keys = {
        "dataset": str(text),
        "cache_dir": str(tmp_path / "cache"),
        "compile": False,
        "max_steps": 40,
        "optimizer_eps": 1e-8,
    }
    config = make_config(
        NETWORK | keys | {"warmup_fraction": 0.0, "micro_batch_size": 4} | overrides, "test"
    )
    return new_trainer(config, tmp_path, "cuda")


def losses(trainer: Trainer, steps: int) -> list[float]:
    return [float(trainer.take_step()[0]) for _ in range(steps)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_a_graph_takes_the_steps_that_are_taken_without_one(optimizer, kind, tmp_path):
    """Dropout is on: a graph draws what the same step draws without it."""
    given = {"optimizer": optimizer, "amp_dtype": kind, "grad_accum": 2, "ema_decay": 0.9}
    plain, graphed = (trainer_of(tmp_path, cuda_graph=on, **given) for on in (False, True))
    expected = losses(plain, EAGER_STEPS + 6)
    assert losses(graphed, EAGER_STEPS + 6) == pytest.approx(expected, rel=5e-3)
    assert plain.graph is None and graphed.graph is not None
    assert len(set(expected)) == len(expected)
    assert (graphed.skipped, graphed.step) == (0, EAGER_STEPS + 6)


def test_training_goes_on_where_it_was_when_a_capture_fails(tmp_path, monkeypatch):
    class Failing(torch.cuda.CUDAGraph):
        def capture_end(self) -> None:
            super().capture_end()
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Failing)
    trainer, stream = trainer_of(tmp_path, amp_dtype="bf16"), torch.cuda.current_stream()
    said: list[str] = []
    trainer.record.say = said.append
    losses(trainer, EAGER_STEPS + 2)
    assert trainer.graph is None and trainer.step == EAGER_STEPS + 2
    assert torch.cuda.current_stream() == stream
    assert any(line.startswith("no CUDA graph") for line in said)


def test_a_bad_step_of_a_graph_changes_nothing(tmp_path):
    trainer = trainer_of(tmp_path, amp_dtype="bf16")
    losses(trainer, EAGER_STEPS + 1)
    weight = trainer.model.final_ln.weight
    before = copy.deepcopy(trainer.model.state_dict())
    weight.data[0] = float("nan")
    trainer.take_step()
    weight.data[0] = before["final_ln.weight"][0]
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items()
    )
    trainer.check_steps(late=0)
    assert trainer.skipped == 1
    assert losses(trainer, 1)[0] < 100


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_restored_run_goes_on_as_if_it_had_not_stopped(optimizer, tmp_path):
    one = trainer_of(tmp_path, optimizer=optimizer, cuda_graph=False)
    losses(one, 4)
    one.save()
    one.writer.finish()
    other = trainer_of(tmp_path, optimizer=optimizer, cuda_graph=False)
    other.restore()
    # sums of atomic additions have no order
    assert losses(other, 4) == pytest.approx(losses(one, 4), rel=1e-3)


def test_a_save_holds_what_was_when_it_was_asked_for(tmp_path):
    trainer = trainer_of(tmp_path, optimizer="AdamW", cuda_graph=False)
    losses(trainer, 2)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.save()
    for p in trainer.model.parameters():
        p.data.zero_()  # while it is written, as a step would
    trainer.writer.finish()
    other = trainer_of(tmp_path, optimizer="AdamW", cuda_graph=False)
    other.restore()
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in other.model.state_dict().items()
    )


def test_no_step_waits_for_the_device(tmp_path):
    trainer = trainer_of(tmp_path, optimizer="Muon", amp_dtype="fp16", cuda_graph=False)
    losses(trainer, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.compute([trainer.micro_batch(0)])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gpu_steps_as_a_cpu(optimizer):
    config = tiny(optimizer=optimizer, optimizer_eps=1e-8, lr=0.01, muon_lr=0.01)
    start = random_model(config)
    stepped = {}
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(start).to(device)
        ids, targets = random_ids(2, 16).to(device), random_ids(2, 16, 1).to(device)
        for _ in range(2):
            model.loss(ids, targets)[0].backward()
            for one in make_optimizers(model, config):
                one.step()
            model.zero_grad()
        stepped[device] = torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
    change = stepped["cpu"] - torch.cat([p.detach().flatten() for p in start.parameters()])
    # Adagrad's and Adam's first step is the gradient's sign, which rounding decides where a
    # gradient is next to nothing.
    assert ((stepped["cuda"] - stepped["cpu"]).norm() / change.norm()).item() < 0.1


@pytest.mark.parametrize("words", [50, 64, 257])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_loss_of_a_head_of_any_size_is_the_plain_one(words, kind):
    torch.manual_seed(0)
    h = torch.randn(2, 9, 16, device="cuda", requires_grad=True)
    weight = torch.randn(words, 16, device="cuda", requires_grad=True)
    targets = torch.randint(words, (2, 9), device="cuda")
    found = []
    for loss in (
        lambda: linear_cross_entropy(h, weight, targets),
        lambda: torch.nn.functional.cross_entropy(
            (h @ weight.T).float().flatten(0, 1), targets.flatten()
        ),
    ):
        h.grad = weight.grad = None
        with torch.autocast("cuda", kind, enabled=kind != torch.float32):
            value = loss()
        value.backward()
        found.append((value.detach(), h.grad, weight.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=2e-2, atol=2e-3 if kind == torch.float32 else 2e-2
        )


def test_fp8_is_refused_or_trains(tmp_path):
    wide = {"amp_dtype": "fp8", "C": 1024, "layers": 1, "cuda_graph": False, "fwpkm_enabled": False}
    if torch.cuda.get_device_capability() < (8, 9):
        with pytest.raises(InputError, match="amp_dtype"):
            trainer_of(tmp_path, **wide)
        return
    with pytest.raises(InputError, match="16 tokens"):
        trainer_of(tmp_path, **wide, block_size=30)
    pytest.importorskip("torchao")
    half, eighth = (
        trainer_of(tmp_path, **(wide | {"amp_dtype": "bf16"})),
        trainer_of(tmp_path, **wide),
    )
    assert losses(eighth, 3) == pytest.approx(losses(half, 3), rel=0.05)
