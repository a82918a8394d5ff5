from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastft.config import RunConfig, parse_bytes
from fastft.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_the_defaults_are_valid():
    config = RunConfig.load()
    assert config == RunConfig()
    assert config.lora.targets is None
    assert not config.trust_remote_code
    assert config.offline


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = write(tmp_path, 'model = "toy-llama"\nbatch_size = 8\nseed = 1\n[lora]\nrank = 4\nalpha = 32\n')
    config = RunConfig.load(path, batch_size=2, rank=8, dropout=None, seed=None)
    assert (config.model, config.batch_size, config.seed) == ("toy-llama", 2, 1)
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (8, 32, 0)


def test_a_flag_of_lora_may_be_flat_or_nested(tmp_path):
    path = write(tmp_path, "[lora]\ndropout = 0.25\nrank = 4\n")
    expected = RunConfig.load(path, rank=8, alpha=2.0)
    assert RunConfig.load(path, lora={"rank": 8, "alpha": 2.0}) == expected
    assert RunConfig.load(path, lora={"rank": 8}, alpha=2.0) == expected
    assert expected.lora.dropout == 0.25


def test_targets_lose_duplicates_and_keep_their_order():
    assert RunConfig.load(targets=["v_proj", "q_proj", "v_proj"]).lora.targets == ("v_proj", "q_proj")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batchsize": 2}, r"key 'batchsize' is unknown; got batchsize; .*did you mean 'batch_size'"),
        ({"lora": {"rnak": 2}}, r"key 'lora.rnak' is unknown; got rnak; .*did you mean 'rank'"),
        ({"batch_size": 0}, "batch_size is not valid; got 0; allowed: .*greater than or equal to 1"),
        ({"batch_size": "many"}, "batch_size is not valid; got many"),
        ({"backend": "tritn"}, "backend is not valid; got tritn; allowed: 'auto', 'triton', 'eager' or 'peft'"),
        ({"learning_rate": 0}, "learning_rate is not valid; got 0"),
        ({"rank": 0}, "lora.rank is not valid; got 0"),
        ({"dropout": 1.0}, "lora.dropout is not valid"),
        ({"targets": []}, "lora.targets is not valid; .*names no module"),
        ({"placement": "half"}, "placement is not valid; got half"),
        (
            {"micro_batch": 3, "batch_size": 4},
            "micro_batch does not divide batch_size; got batch_size 4, micro_batch 3",
        ),
        ({"memory_cap": "7.8 GoB"}, "memory_cap is not a size; got 7.8 GoB"),
        ({"lora": 3}, "lora is not valid"),
    ],
    ids=str,
)
def test_what_is_not_allowed_is_named(flags, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.load(**flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = ", "is not TOML"),
        ("modle = 'tiny'", "key 'modle' is unknown; .*did you mean 'model'"),
        ("[lora]\nrnk = 3", "did you mean 'rank'"),
        ("lora = 3", "lora is not a table; got 3"),
        ("[loar]\nrank = 3", "did you mean 'lora'"),
        ("steps = -2", "steps is not valid; got -2"),
    ],
)
def test_files_that_are_wrong_are_refused(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        RunConfig.load(write(tmp_path, text))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*; got No such file"):
        RunConfig.load(tmp_path / "missing.toml")
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        RunConfig.load(path)


def test_a_configuration_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().batch_size = 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7.8GiB", round(7.8 * 2**30)), ("2GB", 2 * 10**9), ("800 MB", 800_000_000), ("1.5MiB", 3 * 2**19),
        ("3 KB", 3000), ("1kib", 1024), ("5", 5), (" 2 B ", 2), (1024, 1024),
    ],
)  # fmt: skip
def test_sizes(text, expected):
    assert parse_bytes(text) == expected
    assert RunConfig.load(memory_cap=str(text)).memory_cap_bytes == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "1 2GiB", "1e9", "nan", "7,8GiB", "1TiB"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match=r"fix: write it like 7.8GiB"):
        parse_bytes(text)


@given(st.integers(1, 2**22), st.sampled_from(["B", "KB", "MB", "KiB", "MiB", "GiB", ""]), st.sampled_from(["", " "]))
def test_a_size_is_its_number_times_its_unit(number, unit, space):
    factor = parse_bytes(f"1{unit}")
    assert parse_bytes(f"{number}{space}{unit}") == number * factor
    assert parse_bytes(f"{number}{space}{unit.lower()}") == number * factor
