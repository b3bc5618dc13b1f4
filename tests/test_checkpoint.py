"""Checkpoints give back the very network that was saved, or one line that says what is wrong with
the file."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import SHARED, random_ids, random_model, tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoint import load_model, original_config, save_model, save_original, to_original
from common import tensors as tensors_on_disk
from common.command import InputError
from common.files import written_whole
from common.tensors import save_tensors
from config import Config, load_config, save_config
from data.tokenizer import ByteTokenizer
from model import build_model

FIXTURES = SHARED / "fixtures"
FOLDERS = sorted(
    path.parent
    for path in FIXTURES.glob("*/best_model.pt")
    if not path.parent.name.startswith("train5_")
)
every_fixture = pytest.mark.parametrize(
    "fixture",
    [pytest.param(folder, id=folder.name) for folder in FOLDERS]
    or [pytest.param(FIXTURES, marks=pytest.mark.skip(reason=f"{FIXTURES} is absent"))],
)

NETWORKS = {  # overrides that change the names or the sharing of tensors
    "released": {},
    "tied": {"tie_embedding_to_lm_head": True},
    "unshared": {"shared_lifting_weights": False},
    "untied": {"untied_reconstruction": True},
    "untied and unshared": {"untied_reconstruction": True, "shared_lifting_weights": False},
    "bases": {"multi_basis_lifting": True},
    "three unshared bases": {
        "multi_basis_lifting": True,
        "multi_basis_inits": ("zero", "haar", "random"),
        "shared_lifting_weights": False,
    },
    "untied bases": {
        "multi_basis_lifting": True,
        "untied_reconstruction": True,
        "multi_basis_inits": ("zero", "haar", "random"),
        "shared_lifting_weights": False,
    },
    "untied linear bases": {
        "multi_basis_lifting": True,
        "untied_reconstruction": True,
        "lifting_linear_only": True,
    },
    "haar": {"wavelet_mode": "haar"},
    "linear": {"lifting_linear_only": True},
    "wide lifting": {"lifting_hidden_mult": 2},
    "no crawl": {"wavelet_crawl": False},
    "crawl of 5": {"wavelet_crawl_k": 5},
    "moving average": {"decompose_bypass_ema": True},
    "no bypass": {"decompose_bypass": False},
    "no gate": {"use_mixer_gate": False, "cross_scale_gating": False},
    "no low rank": {"low_rank": 0},
    "full widths": {"per_scale_mixer_widths": None},
    "full widths by scale": {"per_scale_mixer_widths": (1.0,) * 4},
    "deep mixers": {"mixer_depth": 3},
    "deep mixers of full width": {"mixer_depth": 2, "per_scale_mixer_widths": None},
    "stabilised deep mixers": {
        "mixer_depth": 2,
        "mixer_depth_stabilizers": True,
        "mixer_depth_residuals": True,
    },
    "spectral norm": {"stab_spectral_norm": True, "layers": 1, "levels": 2},
    "spectral norm of deep mixers": {
        "stable_parametrization": True,
        "mixer_depth": 2,
        "layers": 1,
        "levels": 1,
    },
    "looped": {"looped_blocks": True, "looped_blocks_count": 3},
    "loop iterations": {"loop_iterations": 2},
    "no projection": {"skip_proj_out": True},
    "padded": {"C": 12, "skip_proj_out": True},
    "plain residual": {"learned_residual": False, "per_layer_embedding": False},
    "deep mlp": {"mlp_layers": 4},
    "mlp of one layer": {"mlp_layers": 1},
    "no mlp": {"mlp_expansion": 0},
    "no memories": {"pkm_enabled": False, "fwpkm_enabled": False},
    "memories of several heads": {"pkm_heads": 2, "fwpkm_heads": 4, "fwpkm_num_keys": 25},
    "one layer": {"layers": 1},
    "three layers": {"layers": 3, "levels": 4},
    "levels beyond the block": {"levels": 5, "block_size": 8},
}
NEW_FORMAT_ONLY = {
    "cells": {"multinodal_enabled": True, "multinodal_cross_cell_gating": True},
    "tied cells": {"multinodal_enabled": True, "tie_embedding_to_lm_head": True},
    "sign and exponent": {"exp_parametrization": True},
}


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(random_ids())[0]


def assert_same(loaded, model) -> None:
    """Bit-equal tensors by the same names; equal logits, but for the rounding of products of
    differently aligned memory."""
    got, want = loaded.state_dict(), model.state_dict()
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=1e-6, rtol=1e-6)


def save_run(model, folder: Path) -> Path:
    """A run directory, as far as loading needs it."""
    folder.mkdir(exist_ok=True)
    save_config(model.config, folder / "config.json")
    save_model(model, folder / "best_model.safetensors")
    return folder / "best_model.safetensors"


def copy_of(fixture: Path, folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """A writable copy of a fixture in `folder`; returns its tensors and its config's values."""
    for name in ("best_model.pt", "config.json"):
        (folder / name).write_bytes((fixture / name).read_bytes())
    return torch.load(folder / "best_model.pt", weights_only=True), json.loads(
        (folder / "config.json").read_text()
    )


def error_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_model(path)
    line = str(caught.value)
    assert "\n" not in line
    return line


# ===== Our own format


SHARING = [
    "released",
    "tied",
    "unshared",
    "untied",
    "bases",
    "untied bases",
    "haar",
    "spectral norm",
    "deep mixers",
    "looped",
]


@pytest.mark.parametrize("kind", [*SHARING, *NEW_FORMAT_ONLY])
def test_a_saved_network_loads_as_itself(kind, tmp_path):
    model = random_model(tiny(**(NETWORKS | NEW_FORMAT_ONLY)[kind]))
    save_run(model, tmp_path)
    loaded, config, tokenizer = load_model(tmp_path)
    assert config == model.config and tokenizer is None and not loaded.training
    assert_same(loaded, model)
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert all(tensor.requires_grad for tensor in loaded.parameters()), (
        "a loaded network can be trained on"
    )


def test_a_checkpoint_is_a_folder_or_a_file_by_path_or_text(tmp_path):
    model = random_model(tiny())
    file = save_run(model, tmp_path / "run")
    other = file.rename(file.with_name("latest.safetensors"))
    save_model(model, file)
    for path in (file.parent, str(file.parent), file, str(file), other):
        assert_same(load_model(path)[0], model)


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    model = random_model(tiny(tie_embedding_to_lm_head=True))
    tensors = load_file(save_run(model, tmp_path))
    assert ("token_embedding.weight" in tensors) != ("lm_head.weight" in tensors)
    loaded, _, _ = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.token_embedding.weight


def test_a_loaded_network_trains_as_the_saved_one(tmp_path):
    model = random_model(tiny())
    save_run(model, tmp_path)
    loaded, _, _ = load_model(tmp_path)
    losses = []
    for network in (model, loaded):
        loss, _ = network.train().loss(random_ids(), random_ids(seed=1))
        loss.backward()
        torch.optim.SGD(network.parameters(), 0.1).step()
        losses.append(network.eval().loss(random_ids(), random_ids(seed=1))[0])
    # Not to the last bit: a file's tensors lie at other addresses, by which the kernels order their
    # sums.
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "accident", [RuntimeError("power"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(accident, tmp_path, monkeypatch):
    file = save_run(random_model(tiny()), tmp_path)
    before, names = file.read_bytes(), set(os.listdir(tmp_path))

    def write_half(tensors, path, metadata=None):
        Path(path).write_bytes(before[: len(before) // 2])
        raise accident

    monkeypatch.setattr(tensors_on_disk, "save_file", write_half)
    with pytest.raises(InputError if isinstance(accident, OSError) else type(accident)) as caught:
        save_model(random_model(tiny(), seed=1), file)
    assert file.read_bytes() == before and set(os.listdir(tmp_path)) == names
    if isinstance(accident, OSError):
        assert str(file) in str(caught.value) and "No space left" in str(caught.value)


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with written_whole(path) as beside:
        assert beside.parent == tmp_path, "renaming is atomic within one folder only"
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_writing_where_no_folder_is_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "none" / "model.safetensors"
    with pytest.raises(InputError, match=str(path)):
        save_tensors({"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=str(path.parent)):
        save_original(random_model(tiny()), path.parent)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 500, 0.5, -1])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_cut_short_is_an_error_that_names_it(suffix, length, tmp_path):
    file = save_run(random_model(tiny()), tmp_path)
    if suffix == ".pt":
        file = tmp_path / "best_model.pt"
        save_original(random_model(tiny()), tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * length) if isinstance(length, float) else length])
    assert error_of(file).startswith(f"{file}: ")


def test_what_is_no_checkpoint_is_an_error_that_names_it(tmp_path):
    for name in ("text.safetensors", "text.pt", "text.txt"):
        (tmp_path / name).write_text("no checkpoint " * 100)
        assert str(tmp_path / name) in error_of(tmp_path / name)
    assert str(tmp_path) in error_of(tmp_path)
    assert str(tmp_path / "none") in error_of(tmp_path / "none")


def test_a_checkpoint_without_its_config_is_an_error_that_names_the_config(tmp_path):
    """Of our format: an old one shows its shape, see tests/test_published.py."""
    save_run(random_model(tiny()), tmp_path)
    (tmp_path / "config.json").unlink()
    assert str(tmp_path / "config.json") in error_of(tmp_path / "best_model.safetensors")


def rewrite(path: Path, change) -> None:
    """Applies `change` to the tensors of a checkpoint of either format."""
    tensors = (
        load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    )
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


@pytest.fixture(params=["ours", "the first implementation's"])
def saved(request, tmp_path) -> Path:
    """A checkpoint in either format."""
    model = random_model(tiny())
    if request.param == "ours":
        return save_run(model, tmp_path)
    save_original(model, tmp_path)
    return tmp_path / "best_model.pt"


def test_a_missing_tensor_is_an_error_that_names_it(saved):
    rewrite(saved, lambda tensors: tensors.pop("layers.1.ln2.bias"))
    line = error_of(saved)
    assert str(saved) in line and "layers.1.ln2.bias" in line


def test_an_unused_tensor_is_an_error_that_names_it(saved):
    rewrite(saved, lambda tensors: tensors.update({"layers.1.surprise.weight": torch.ones(3)}))
    line = error_of(saved)
    assert str(saved) in line and "layers.1.surprise.weight" in line


def test_a_tensor_of_another_shape_is_an_error_that_names_it_and_both_shapes(saved):
    rewrite(saved, lambda tensors: tensors.update({"layers.1.ln2.bias": torch.ones(3)}))
    line = error_of(saved)
    assert str(saved) in line and "layers.1.ln2.bias" in line and "[3]" in line and "[16]" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_tensor_that_is_not_finite_is_an_error_that_names_it(saved, value):
    rewrite(saved, lambda tensors: tensors["layers.1.ln2.bias"][3].fill_(value))
    line = error_of(saved)
    assert str(saved) in line and "layers.1.ln2.bias" in line and "finite" in line


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64, torch.bool])
def test_a_tensor_of_another_type_is_an_error_that_names_it_and_both_types(saved, dtype):
    rewrite(saved, lambda tensors: tensors.update({"layers.1.ln2.bias": torch.ones(16).to(dtype)}))
    line = error_of(saved)
    assert (
        str(saved) in line
        and "layers.1.ln2.bias" in line
        and str(dtype)[6:] in line
        and "float32" in line
    )


def test_a_tokenizer_of_another_vocabulary_is_an_error_that_names_both(saved):
    ByteTokenizer().save(saved.parent)
    line = error_of(saved)
    assert str(saved) in line and "50" in line and "256" in line


def test_the_same_network_is_written_as_the_same_bytes_every_time(tmp_path):
    tensors = {"a": torch.ones(3), "é": torch.zeros(2, 2)}
    metadata = {key: key for key in 'zyxabc"é'}
    by_library, by_us = set(), set()
    for i in range(4):
        save_file(tensors, tmp_path / "theirs", metadata)
        by_library.add((tmp_path / "theirs").read_bytes())
        save_tensors(tensors, tmp_path / f"{i}.safetensors", metadata)
        by_us.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(by_us) == 1
    assert len(by_library) > 1, "safetensors' own order differs by call, or nothing was tested"
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("a"), tensors["a"])


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_new_files_have_the_mode_that_the_umask_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_run(random_model(tiny()), tmp_path / "run")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "run").iterdir()} == {
        0o666 & ~umask
    }


@pytest.mark.parametrize(
    "change",
    [
        {"C": 32},
        {"layers": 3},
        {"mlp_expansion": 3},
        {"pkm_num_keys": 25},
        {"learned_residual": False},
    ],
)
def test_a_config_of_another_network_is_an_error_that_names_the_file(saved, change):
    path = saved.parent / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert str(saved) in error_of(saved)


def test_many_missing_tensors_are_named_in_a_line_of_bounded_length(saved):
    rewrite(
        saved,
        lambda tensors: [
            tensors.pop(name) for name in list(tensors) if name.startswith("layers.1.")
        ],
    )
    assert len(error_of(saved)) < 1000


def test_a_network_without_embedding_is_no_checkpoint(saved):
    rewrite(saved, lambda tensors: tensors.pop("token_embedding.weight"))
    assert "token_embedding.weight" in error_of(saved)


# ===== The first implementation's format


@pytest.mark.parametrize("kind", NETWORKS)
def test_writing_and_reading_the_old_format_is_the_identity(kind, tmp_path):
    model = random_model(tiny(**NETWORKS[kind]))
    save_original(model, tmp_path)
    loaded, config, _ = load_model(tmp_path / "best_model.pt")
    assert_same(loaded, model)
    for key in Config.network_keys():
        assert getattr(config, key) == getattr(model.config, key)


@pytest.mark.parametrize("kind", NEW_FORMAT_ONLY)
def test_a_network_the_old_format_cannot_hold_is_an_error(kind, tmp_path):
    with pytest.raises(InputError) as caught:
        save_original(random_model(tiny(**NEW_FORMAT_ONLY[kind])), tmp_path)
    if kind != "tied cells":
        assert "old format" in str(caught.value)
    assert os.listdir(tmp_path) == []


@every_fixture
def test_reading_and_writing_the_old_format_is_the_identity(fixture):
    raw = torch.load(fixture / "best_model.pt", weights_only=True)
    old = {name.removeprefix("_orig_mod."): tensor for name, tensor in raw.items()}
    model, config, _ = load_model(fixture)
    written = to_original(model)
    dropped = {  # networks that nothing ever reads
        name
        for name in old
        if config.untied_reconstruction and "lifting_reconstruct" in name and "predict_nets" in name
    }
    assert written.keys() == old.keys() - dropped
    for name, tensor in written.items():
        assert torch.equal(tensor, old[name]), name


def test_a_compiled_network_s_prefix_is_stripped(tmp_path):
    model = random_model(tiny())
    save_original(model, tmp_path)
    old = torch.load(tmp_path / "best_model.pt", weights_only=True)
    torch.save(
        {f"_orig_mod.{name}": tensor for name, tensor in old.items()}, tmp_path / "best_model.pt"
    )
    assert_same(load_model(tmp_path)[0], model)


def test_a_file_of_another_name_is_read_too(tmp_path):
    model = random_model(tiny())
    save_original(model, tmp_path)
    (tmp_path / "best_model.pt").rename(tmp_path / "step_100.pt")
    assert_same(load_model(tmp_path / "step_100.pt")[0], model)


SHOWN = [  # keys whose value the names and shapes of an old state dict show
    "C", "layers", "levels", "low_rank", "mlp_expansion", "mlp_layers", "wavelet_mode",
    "shared_lifting_weights",
    "untied_reconstruction", "multi_basis_lifting", "multi_basis_inits", "cross_scale_gating",
    "per_scale_mixer_widths",
    "wavelet_crawl", "wavelet_crawl_k", "lifting_linear_only", "lifting_hidden_mult",
    "use_mixer_gate", "mixer_depth",
    "mixer_depth_stabilizers", "decompose_bypass", "decompose_bypass_ema", "learned_residual",
    "skip_proj_out",
    "tie_embedding_to_lm_head", "per_layer_embedding", "pkm_enabled", "pkm_num_keys", "pkm_heads",
    "fwpkm_enabled",
    "fwpkm_num_keys", "fwpkm_heads", "stab_spectral_norm",
]  # fmt: skip
WITHOUT_EFFECT_ON_A_TRAINED_NETWORK = [  # initial scales, and what only training reads
    "lifting_init", "lifting_dropout", "stable_parametrization", "stab_ff_scaling",
    "stab_proj_out_scaling",
    "stab_mixer_eps_scaling", "stab_lifting_level_scaling", "decompose_bypass_cross_window",
    "stochastic_depth_rate",
    *(f"dropout_{place}" for place in ("embedding", "projection", "mixer", "mlp", "lm_head")),
]  # fmt: skip


def logits_with(folder: Path, values: dict, ids: torch.Tensor) -> torch.Tensor:
    (folder / "config.json").write_text(json.dumps(values))
    with torch.no_grad():
        return load_model(folder)[0](ids)[0]


def network_of(config: Config) -> dict:
    """The values that make a difference to a trained network of `config`."""
    values = {key: getattr(config, key) for key in SHOWN}
    values["multi_basis_inits"] = config.multi_basis_lifting and len(config.multi_basis_inits)
    for memory in ("pkm", "fwpkm"):
        if not values[f"{memory}_enabled"]:
            del values[f"{memory}_num_keys"], values[f"{memory}_heads"]
    return values


@every_fixture
def test_each_absent_key_is_read_off_the_tensors(fixture, tmp_path):
    tensors, values = copy_of(fixture, tmp_path)
    tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}
    expected = torch.load(fixture / "expected.pt", weights_only=True)
    whole = network_of(original_config(values, tensors, fixture))
    for key in SHOWN:
        lacking = {name: value for name, value in values.items() if name != key}
        # perhaps another way to say the same
        if network_of(original_config(lacking, tensors, fixture)) != whole:
            logits = logits_with(tmp_path, lacking, expected["ids"])
            torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0, msg=key)


@every_fixture
def test_all_absent_keys_are_read_off_the_tensors_together(fixture, tmp_path):
    _, values = copy_of(fixture, tmp_path)
    expected = torch.load(fixture / "expected.pt", weights_only=True)
    rest = {
        key: value
        for key, value in values.items()
        if key not in SHOWN + WITHOUT_EFFECT_ON_A_TRAINED_NETWORK
    }
    logits = logits_with(tmp_path, rest, expected["ids"])
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", NETWORKS)
def test_absent_keys_are_read_off_the_tensors_of_every_network(kind, tmp_path):
    model = random_model(tiny(**NETWORKS[kind]))
    rest = {
        key: value
        for key, value in model.config.model_dump(mode="json").items()
        if key not in SHOWN
    }
    if network_of(original_config(rest, to_original(model), tmp_path)) != network_of(model.config):
        save_original(model, tmp_path)
        torch.testing.assert_close(
            logits_with(tmp_path, rest, random_ids()), logits_of(model), atol=1e-6, rtol=1e-6
        )


@pytest.mark.parametrize(
    ("network", "ignored"),
    [
        (
            {"mixer_depth": 2, "per_scale_mixer_widths": None},
            {"per_scale_mixer_widths": [1.0, 1.0, 0.5, 0.5]},
        ),
        ({"wavelet_mode": "haar"}, {"untied_reconstruction": True}),
        ({}, {"mixer_depth_residuals": True}),
    ],
)
def test_a_key_that_the_first_implementation_did_not_look_at_changes_nothing(
    network, ignored, tmp_path
):
    model = random_model(tiny(**network))
    save_original(model, tmp_path)
    values = model.config.model_dump(mode="json") | ignored
    torch.testing.assert_close(
        logits_with(tmp_path, values, random_ids()), logits_of(model), atol=1e-6, rtol=1e-6
    )


def test_an_old_config_s_gate_activation_is_silu_when_absent(tmp_path):
    model = random_model(tiny())
    save_original(model, tmp_path)
    values = model.config.model_dump(mode="json")
    del values["mixer_gate_activation"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_model(tmp_path)[1].mixer_gate_activation == "silu"


@pytest.mark.parametrize(
    "name",
    [
        "layers.1.lifting_wavelet.predict_nets.0.0.weight",
        "layers.0.lifting_reconstruct.decompose.update_nets.2.3.bias",
        "layers.1.lifting_reconstruct.decompose.dilation_logits",
    ],
)
def test_copies_of_a_shared_tensor_that_differ_are_an_error_that_names_them(name, tmp_path):
    save_original(random_model(tiny()), tmp_path)
    rewrite(tmp_path / "best_model.pt", lambda tensors: tensors[name].add_(1))
    assert name in error_of(tmp_path)


def test_a_tied_head_that_differs_from_the_embedding_is_an_error_that_names_it(tmp_path):
    save_original(random_model(tiny(tie_embedding_to_lm_head=True)), tmp_path)
    rewrite(tmp_path / "best_model.pt", lambda tensors: tensors["lm_head.weight"].add_(1))
    assert "lm_head.weight" in error_of(tmp_path)


def test_an_unknown_key_that_is_true_is_an_error_that_names_it_and_others_are_ignored(tmp_path):
    model = random_model(tiny())
    save_original(model, tmp_path)
    values = model.config.model_dump(mode="json")
    idle = {
        "use_flux_capacitor": False,
        "flux": 3,
        "flux_mode": "on",
        "flux_list": [1],
        "flux_none": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(values | idle))
    assert_same(load_model(tmp_path)[0], model)
    (tmp_path / "config.json").write_text(json.dumps(values | {"use_flux_capacitor": True}))
    assert "use_flux_capacitor" in error_of(tmp_path)


def test_how_an_old_run_was_trained_does_not_matter_to_its_weights(tmp_path):
    model = random_model(tiny())
    save_original(model, tmp_path)
    training = {
        "optimizer": "adagrad", "amp_dtype": "float16", "device": "cuda:0",
        "compile_mode": "max-autotune-no-cudagraphs",
        "epochs": 0, "warmup_fraction": 1, "dataset_name": None, "tokenizer": None,
        "eval_interval": 0, "lr": 0,
        "generation_prompt": "", "top_p": 0, "repetition_penalty": 0.9, "max_steps": 0, "seed": -1,
        "grad_clip": None,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(
        json.dumps(model.config.model_dump(mode="json") | training)
    )
    assert_same(load_model(tmp_path)[0], model)


def test_a_wrong_network_key_of_an_old_config_is_an_error_that_names_it(tmp_path):
    save_original(random_model(tiny()), tmp_path)
    values = load_config(tmp_path / "config.json").model_dump(mode="json")
    (tmp_path / "config.json").write_text(json.dumps(values | {"wavelet_mode": "dct"}))
    assert "wavelet_mode" in error_of(tmp_path)


def test_fast_weights_left_in_an_old_file_are_added_to_the_values(tmp_path):
    model = random_model(tiny())
    save_original(model, tmp_path)
    with torch.no_grad():
        for i, layer in enumerate(model.layers):
            change = torch.randn_like(layer.fwpkm.values.weight)
            rewrite(
                tmp_path / "best_model.pt",
                lambda t, i=i, c=change: t[f"layers.{i}.fwpkm.value_deltas"].copy_(c),
            )
            layer.fwpkm.values.weight += change
    assert_same(load_model(tmp_path)[0], model)


def test_an_old_file_without_fast_weights_is_read_too(tmp_path):
    model = random_model(tiny())
    save_original(model, tmp_path)
    rewrite(
        tmp_path / "best_model.pt",
        lambda tensors: [
            tensors.pop(name) for name in list(tensors) if name.endswith("value_deltas")
        ],
    )
    assert_same(load_model(tmp_path)[0], model)


class Malicious:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("place", ["alone", "among tensors"])
def test_code_in_a_pickle_is_never_run(place, tmp_path):
    save_original(random_model(tiny()), tmp_path)
    path, mark = tmp_path / "best_model.pt", tmp_path / "pwned"
    tensors = torch.load(path, weights_only=True)
    torch.save(Malicious(mark) if place == "alone" else tensors | {"extra": Malicious(mark)}, path)
    assert str(path) in error_of(path) and not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the pickle would have done it"


@pytest.mark.parametrize(
    "content", [[1, 2], {"model": {"a": torch.ones(1)}}, {"a": 1}, torch.ones(1), {}]
)
def test_an_old_file_that_is_no_plain_state_dict_is_an_error_that_names_it(content, tmp_path):
    save_original(random_model(tiny()), tmp_path)
    torch.save(content, tmp_path / "best_model.pt")
    assert str(tmp_path / "best_model.pt") in error_of(tmp_path)


def test_a_run_directory_prefers_our_format(tmp_path):
    ours, old = random_model(tiny()), random_model(tiny(), seed=1)
    save_original(old, tmp_path)
    save_run(ours, tmp_path)
    assert_same(load_model(tmp_path)[0], ours)


def test_the_vocabulary_is_the_embedding_s(tmp_path):
    model = build_model(tiny(), 77)
    save_run(model, tmp_path / "a")
    assert load_model(tmp_path / "a")[0].vocab_size == 77
    (tmp_path / "b").mkdir()
    save_original(model, tmp_path / "b")
    assert load_model(tmp_path / "b")[0].vocab_size == 77
