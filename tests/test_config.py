"""A config is complete, typed, ranged, consistent and frozen; what is wrong with one is said in one
line that names the key."""

import json
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, tiny
from pydantic import ValidationError

from common.command import InputError, Parser, run_command
from config import (
    LAST_WITH_REMOVED,
    REMOVED_KEYS,
    REMOVED_VALUES,
    SECTIONS,
    Config,
    add_config_options,
    given_options,
    legal_values,
    load_config,
    make_config,
    save_config,
)
from model import build_model

KEYS = list(Config.model_fields)


def error_of(values: dict) -> str:
    with pytest.raises(InputError) as caught:
        make_config(values, "my.json")
    line = str(caught.value)
    assert line.startswith("my.json: ") and "\n" not in line
    return line


def command_line(*arguments: str) -> dict:
    parser = Parser("")
    parser.add_argument("--config")
    add_config_options(parser)
    return given_options(parser.parse_args(arguments))


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("layer", "layers"),
        ("drop_out_mlp", "dropout_mlp"),
        ("blocksize", "block_size"),
        ("levles", "levels"),
    ],
)
def test_an_unknown_key_is_an_error_that_suggests_the_nearest(wrong, right):
    line = error_of({wrong: 3})
    assert wrong in line and f"did you mean {right}" in line


@pytest.mark.parametrize(
    "wrong, hint", [("--levles", "did you mean --levels?"), ("--qqqq=3", "see --help")]
)
def test_an_unknown_option_is_an_error_that_names_it(wrong, hint):
    with pytest.raises(
        InputError, match=re.escape(f"unknown option {wrong.partition('=')[0]}; {hint}")
    ):
        command_line(wrong, "3")


def test_an_unknown_key_unlike_any_other_is_an_error_that_names_it():
    line = error_of({"qqqq": 3})
    assert "qqqq" in line and "did you mean" not in line


def test_a_value_of_the_wrong_type_is_an_error_that_names_the_key_and_the_value():
    for key in KEYS:
        kind = str(Config.model_fields[key].annotation)
        wrong = [["a"] if key == "dataset_mix" else {"a": 1}]
        if "str" not in kind and "Literal" not in kind:
            wrong.append("many")
        if "float" not in kind:
            wrong.append(1.5)
        if "bool" not in kind:
            wrong.append(True)
        if "None" not in kind and "Optional" not in kind:
            wrong.append(None)
        for value in wrong:
            line = error_of({key: value})
            assert f" {key}: " in line and json.dumps(value) in line


def test_a_number_with_a_fraction_is_no_integer_and_an_integer_is_a_number():
    assert " layers: " in error_of({"layers": 2.5})
    assert make_config({"lr": 1}, "x").lr == 1.0


@pytest.mark.parametrize(
    "key", ["optimizer", "wavelet_mode", "mixer_gate_activation", "lifting_init", "eval_context"]
)
def test_a_word_that_is_no_choice_is_an_error_that_lists_the_choices(key):
    line = error_of({key: "sgdd"})
    choices = Config.model_fields[key].annotation.__args__
    assert f" {key}: " in line and all(choice in line for choice in choices)


def test_a_value_past_its_range_is_an_error_that_names_the_key():
    beyond = {
        "ge": lambda v, step: v - step,
        "gt": lambda v, _: v,
        "le": lambda v, step: v + step,
        "lt": lambda v, _: v,
    }
    for key, field in Config.model_fields.items():
        step = 1 if "int" in str(field.annotation) else 1e-6
        for limit in field.metadata:
            for kind, past in beyond.items():
                if hasattr(limit, kind):
                    assert f" {key}: " in error_of({key: past(getattr(limit, kind), step)})


@pytest.mark.parametrize(
    "key, value",
    [
        ("C", 0), ("layers", 0), ("levels", 0), ("block_size", 0), ("mlp_expansion", -1),
        ("mlp_layers", 0), ("low_rank", -1),
        ("mixer_depth", 0), ("loop_iterations", 0), ("dropout_mlp", 1.0), ("dropout_mlp", -0.1),
        ("lifting_dropout", 1.0),
        ("stochastic_depth_rate", 1.0), ("pkm_top_k", 0), ("fwpkm_chunk_size", 1),
        ("fwpkm_update_lr", 0.0), ("lr", 0.0),
        ("lr", -1.0), ("warmup_fraction", 1.0), ("top_p", 0.0), ("top_p", 1.1),
        ("temperature", -0.1), ("num_new_tokens", -1),
        ("repetition_penalty", 0.5), ("micro_batch_size", 0), ("grad_accum", 0), ("epochs", 0.0),
        ("max_steps", 0),
        ("multi_basis_inits", ()), ("multi_basis_inits", ("haar", "hair")), ("dataset", ""),
        ("adam_betas", (0.9,)),
        ("lr", float("nan")), ("lr", float("inf")), ("epochs", float("inf")),
        ("temperature", float("inf")),
        ("grad_clip", float("nan")), ("multinodal_bagged_eps", float("nan")),
        ("split_fractions", (float("nan"), 0.5, 0.5)),
        ("per_scale_mixer_widths", (float("inf"),) * 6),
        ("dataset_mix", {"": 1.0}),
        ("dataset_mix", {"books": 0.0}), ("dataset_mix", {"books": float("nan")}),
        ("dataset_mix", {"wikitext-103": 1.0}),
    ],
)  # fmt: skip
def test_senseless_values_are_errors_that_name_the_key(key, value):
    assert f" {key}: " in error_of({key: value})


SINGLE = {"per_scale_mixer_widths": None}
CONTRADICTIONS = [
    ("dataset_mix", {"dataset_mix": {"books": 1.0}, "decompose_bypass_cross_window": True}),
    ("wavelet_crawl_k", {"wavelet_crawl_k": 4}),
    ("per_scale_mixer_widths", {"levels": 4}),
    ("per_scale_mixer_widths", {"per_scale_mixer_widths": (1.0,)}),
    ("per_scale_mixer_widths", {"per_scale_mixer_widths": (1.0, 1.0, 1.0, 0.5, 0.5, 0.0)}),
    ("per_scale_mixer_widths", {"per_scale_mixer_widths": (1.0, 1.0, 1.0, 0.5, 0.5, -0.5)}),
    ("per_scale_mixer_widths", {"C": 16, "per_scale_mixer_widths": (1.0, 1.0, 1.0, 0.5, 0.5,
        0.01)}),
    (  # the width of a cell, not C, is what the mixers have
        "per_scale_mixer_widths",
        {
            "multinodal_enabled": True, "multinodal_cell_dim": 16,
            "per_scale_mixer_widths": (1.0, 1.0, 1.0, 0.5, 0.5, 0.01),
        },
    ),
    ("pkm_num_keys", {"pkm_num_keys": 1000}),
    ("fwpkm_num_keys", {"fwpkm_num_keys": 1000}),
    ("pkm_heads", {"pkm_heads": 3}),
    ("fwpkm_heads", {"fwpkm_heads": 3}),
    ("pkm_heads", {"C": 9, "fwpkm_enabled": False}),
    ("pkm_heads", {"multinodal_enabled": True, "multinodal_cell_dim": 9, "fwpkm_enabled": False}),
    ("stab_spectral_norm", {"stab_spectral_norm": True, "exp_parametrization": True}),
    ("stab_spectral_norm", {"stab_spectral_norm": True, "gradient_checkpointing": True}),
    ("stab_spectral_norm", {"stable_parametrization": True, "exp_parametrization": True}),
    ("split_fractions", {"split_fractions": (0.5, 0.5)}),
    ("split_fractions", {"split_fractions": (0.5, 0.5, 0.5)}),
    ("split_fractions", {"split_fractions": (1.0, 0.0, 0.0)}),
    ("untied_reconstruction", {"untied_reconstruction": True, "wavelet_mode": "haar"}),
    ("untied_reconstruction", {"untied_reconstruction": True, "wavelet_mode": "packets",
        "per_scale_mixer_widths": None}),
    ("per_scale_mixer_widths", {"wavelet_mode": "packets"}),
    ("lifting_gate", {"lifting_gate": True, "wavelet_mode": "packets",
        "per_scale_mixer_widths": None}),
    ("levels", {"wavelet_mode": "packets", "levels": 9, "block_size": 1024,
        "per_scale_mixer_widths": None}),
    ("mixer_top_k", {"mixer_top_k": 2048}),
    ("decompose_bypass_ema", {"decompose_bypass": False, "decompose_bypass_ema": True}),
    (
        "multinodal_cross_cell_gating",
        {"multinodal_enabled": True, "multinodal_cross_cell_gating": True,
            "multinodal_num_cells": 1},
    ),
    ("multinodal_seeds", {"multinodal_enabled": True, "multinodal_num_cells": 3}),
    ("multinodal_features_per_cell", {"multinodal_features_per_cell": 0}),
    ("multinodal_features_per_cell", {"multinodal_features_per_cell": 513}),
]  # fmt: skip


@pytest.mark.parametrize("key, values", CONTRADICTIONS)
def test_an_impossible_combination_is_an_error_that_names_the_key(key, values):
    assert key in error_of(values)


def test_the_config_of_an_old_run_loads_where_its_removed_keys_are_off(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny().model_dump(mode="json") | REMOVED_KEYS))
    assert load_config(path) == tiny()
    assert not set(REMOVED_KEYS) & set(tiny().model_dump())


REMOVED = [
    (key, not off if isinstance(off, bool) else off + 2.0) for key, off in REMOVED_KEYS.items()
]
REMOVED += [(key, value) for key, values in REMOVED_VALUES.items() for value in values]


@pytest.mark.parametrize("key, value", REMOVED)
def test_what_was_removed_is_an_error_that_says_so_and_names_the_last_commit_that_has_it(
    key, value
):
    line = error_of({key: value})
    assert line.startswith(f"my.json: {key}: {json.dumps(value)} was removed") and line.endswith(
        LAST_WITH_REMOVED
    )


@pytest.mark.parametrize("key", REMOVED_KEYS)
def test_the_option_of_a_removed_key_is_an_error_that_says_so(key):
    with pytest.raises(InputError, match=f"--{key}: was removed.*{LAST_WITH_REMOVED}$"):
        command_line(f"--{key}", "3")


def test_a_memory_that_is_off_needs_no_valid_size():
    make_config({"pkm_enabled": False, "pkm_num_keys": 1000, "fwpkm_enabled": False, "C": 9}, "x")


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "not JSON"),
        ('{"C": 4,}', "not JSON"),
        ("[1]", "object"),
        ("3", "object"),
        ('{"C": "4"}', " C: "),
    ],
)
def test_a_file_that_holds_no_config_is_an_error_that_names_it(tmp_path, text, problem):
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert (
        str(path) in str(caught.value)
        and problem in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_a_missing_file_a_folder_and_invalid_utf8_are_errors_that_name_them(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'{"dataset": "\xe9"}')
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "latin.json"):
        with pytest.raises(InputError, match=str(path)):
            load_config(path)


def test_input_errors_end_a_command_with_one_line_on_stderr_and_code_2(capsys):
    def main():
        raise InputError("C: must be more")

    with pytest.raises(SystemExit) as end:
        run_command(main)
    output = capsys.readouterr()
    assert (end.value.code, output.err, output.out) == (2, "error: C: must be more\n", "")


def test_an_output_that_nobody_reads_ends_a_command_without_a_traceback():
    command = [
        sys.executable,
        "-c",
        "from common.command import run_command; run_command(lambda: print('x' * 10**6))",
    ]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (141, "the reader of the output is gone\n")


def test_options_of_the_command_line_override_the_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"C": 64, "layers": 3, "lr": 0.5}')
    config = load_config(path, **command_line("--config", "x", "--C", "32", "--lr", "1e-3"))
    assert (config.C, config.layers, config.lr) == (32, 3, 0.001)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--decompose_bypass", "false"], {"decompose_bypass": False}),
        (["--compile", "False", "--use_amp", "True"], {"compile": False, "use_amp": True}),
        (["--max_steps", "null"], {"max_steps": None}),
        (["--max_steps", "None"], {"max_steps": None}),
        (["--dataset_mix", "[]"], {"dataset_mix": ()}),
        (["--dataset_mix", '{"pg19": 0.5}'], {"dataset_mix": (("pg19", 0.5),)}),
        (
            ["--per_scale_mixer_widths", "[1, 1, 1, 1, 0.5, 0.5]"],
            {"per_scale_mixer_widths": (1, 1, 1, 1, 0.5, 0.5)},
        ),
        (["--multi_basis_inits", '["haar", "zero"]'], {"multi_basis_inits": ("haar", "zero")}),
        (
            ["--optimizer", "AdamW", "--amp_dtype", "bf16"],
            {"optimizer": "AdamW", "amp_dtype": "bf16"},
        ),
        (
            ["--dataset", "123", "--generation_prompt", "null"],
            {"dataset": "123", "generation_prompt": "null"},
        ),
        (["--dataset_path", ""], {"dataset_path": ""}),
        ([], {}),
    ],
)
def test_options_of_the_command_line_have_their_keys_types(arguments, expected):
    given = command_line(*arguments)
    config = make_config(given, "command line")
    assert given.keys() == expected.keys()
    assert {key: getattr(config, key) for key in expected} == expected


def test_a_wrong_option_of_the_command_line_is_an_error_that_names_the_key():
    assert " C: " in error_of(command_line("--C", "many"))
    assert " use_amp: " in error_of(command_line("--use_amp", "yes"))


def test_every_value_survives_the_command_line():
    config = tiny(max_steps=7)
    arguments = []
    for key, value in config.model_dump(mode="json").items():
        arguments += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    assert make_config(command_line(*arguments), "command line") == config


def test_help_lists_every_key_with_its_meaning_legal_values_and_default():
    parser = Parser("")
    add_config_options(parser)
    # argparse breaks lines after hyphens
    text = " ".join(parser.format_help().split()).replace("- ", "-")
    schemas = Config.model_json_schema()["properties"]
    for key, field in Config.model_fields.items():
        values = legal_values(schemas[key]).replace("`", "")
        default = json.dumps(field.default, ensure_ascii=False)
        assert f"--{key} VALUE " in text
        shown = f"{field.description} [{values}; default {default}]"
        assert shown.replace("- ", "-") in text, key
    assert "blocks [integer, 1 to 4,096; default 2]" in text


def test_every_key_is_documented_and_in_a_section():
    assert KEYS[0] in SECTIONS and SECTIONS.keys() <= set(KEYS)
    for key, field in Config.model_fields.items():
        assert field.description, key


def test_a_saved_config_loads_as_itself(tmp_path):
    config = tiny(
        levels=4,
        max_steps=7,
        decompose_bypass_ema=True,
        multi_basis_inits=("zero", "random"),
        dataset="a/é.txt",
    )
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")).keys() == set(KEYS)


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError):
        tiny().C = 3


def test_configs_of_the_repository_are_valid():
    for path in [ROOT / "config.json", *(ROOT / "configs").glob("*.json")]:
        if path.is_file():
            load_config(path)


def test_every_key_of_the_first_implementation_is_known(shared):
    for path in (shared / "fixtures").glob("*/config.json"):
        assert json.loads(path.read_text()).keys() <= set(KEYS), path


@pytest.fixture
def released() -> Config:
    if not (ROOT / "config.json").is_file():
        pytest.skip("config.json is absent")
    return load_config(ROOT / "config.json")


def test_the_released_configuration_has_882_511_981_parameters(released):
    with torch.device("meta"):
        model = build_model(released, 50257)
    assert sum(parameter.numel() for parameter in model.parameters()) == 882_511_981


def test_the_defaults_are_the_released_network(released):
    for key in Config.network_keys():
        assert getattr(released, key) == getattr(Config(), key)
