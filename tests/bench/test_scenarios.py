from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.arms import ARMS
from bench.scenarios import SCENARIOS, Scenario, load_scenario
from fastft.config import RunConfig
from fastft.errors import ConfigError, FastftError
from fastft.models.shapes import SHAPES


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_built_in_scenario_can_be_sent_to_a_worker_unchanged(name):
    scenario = SCENARIOS[name]
    assert scenario.name == name
    assert Scenario.model_validate_json(scenario.model_dump_json()) == scenario
    assert set(scenario.arms) <= set(ARMS)
    assert scenario.arms[0] in ("peft", "triton+default"), "every ratio needs the baseline"
    assert scenario.config.model == "tiny" or scenario.config.model in SHAPES


@pytest.mark.parametrize("name", ["llama-3-8b-nf4", "llama-3-8b-short", "llama-3-8b-long"])
def test_a_scenario_of_a_plans_gain_is_the_default_against_the_plan(name):
    assert SCENARIOS[name].arms == ("triton+default", "triton")


def test_the_embedded_scenario_trains_for_its_recipe_and_judges_accuracy():
    scenario = SCENARIOS["embedded"]
    assert scenario.total_steps == 200
    assert scenario.repetitions == len(scenario.seeds) == 3
    assert scenario.accuracy is not None
    assert scenario.accuracy.rows == 128
    assert SCENARIOS["embedded-quick"].accuracy is None


@pytest.mark.parametrize(
    ("name", "batch", "tokens"),
    [("llama-3-8b", 16, 2048), ("qwen2-1.5b", 16, 2048), ("qwen2-1.5b-small-batch", 1, 1024)],
)
def test_speed_scenarios_are_the_published_work(name, batch, tokens):
    scenario = SCENARIOS[name]
    assert (scenario.config.batch_size, scenario.config.sequence_tokens) == (batch, tokens)
    assert scenario.data == "random"
    # Only then does `fastft tune MODEL --sequence-tokens N` make the plan that the scenario looks up.
    assert scenario.config == RunConfig(model=scenario.config.model, batch_size=batch, sequence_tokens=tokens)
    assert (scenario.warmup_steps, scenario.steps, scenario.repetitions) == (2, 6, 3)
    assert scenario.arms == ("peft", "peft+checkpointing", "triton")


def test_an_unknown_name_suggests_the_closest():
    with pytest.raises(ConfigError, match="did you mean 'embedded-quick'") as caught:
        load_scenario("embeded-quick")
    assert "qwen2-1.5b" in str(caught.value)


def test_a_toml_scenario_overrides_only_what_it_names(tmp_path):
    path = write(
        tmp_path,
        """
        arms = ["peft", "eager"]
        steps = 7
        data = "random"
        [config]
        model = "toy-llama"
        batch_size = 2
        [config.lora]
        rank = 8
        """,
    )
    scenario = load_scenario(path)
    assert scenario.name == "mine"
    assert scenario.config.lora.rank == 8
    assert scenario.config.model == "toy-llama"
    assert scenario.warmup_steps == Scenario.model_fields["warmup_steps"].default
    assert scenario.run_config(5).steps == scenario.total_steps == 7 + scenario.warmup_steps
    assert scenario.run_config(5).seed == 5
    assert load_scenario(str(path)) == scenario


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 3", "did you mean 'steps'"),
        ("steps = 3\n[config]\nbatchsize = 4", "did you mean 'batch_size'"),
        ("steps = 3\n[config.lora]\nranks = 4", "did you mean 'rank'"),
        ("steps = 3\n[accuracy]\nrow = 4", "did you mean 'rows'"),
        ("steps = 3\n[gate]\nlayer = 4", "did you mean 'layers'"),
        ("steps = 3\n[config]\nsteps = 4", "the scenario itself sets config's steps"),
        ("steps = 3\n[config]\nseed = 4", "the scenario itself sets config's seed"),
        ("steps = 3\nconfig = 4", "not a table"),
        ("steps = 0", "steps"),
        ("warmup_steps = 0\nsteps = 1", "2 in all or more"),
        ("warmup_steps = 3", "steps"),
        ("steps = 3\nseeds = []", "seeds"),
        ("steps = 3\nrepetitions = 0", "repetitions"),
        ('steps = 3\narms = ["pefft"]', "did you mean 'peft'"),
        ('steps = 3\narms = ["peft", "peft"]', "named twice"),
        ('steps = 3\ndata = "random"\n[accuracy]\nrows = 4', "embedded task only"),
        ('steps = 3\n[config]\ndata = "rows.jsonl"\n[accuracy]\nrows = 4', "embedded task only"),
        ("steps = 3\n[gate]\nlayers = 2", "layers"),
        ("steps = 3 =", "not TOML"),
    ],
)
def test_a_bad_toml_scenario_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_scenario(write(tmp_path, text))


def test_a_missing_toml_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load_scenario(tmp_path / "nowhere.toml")


def test_changes_are_validated_like_a_file():
    scenario = SCENARIOS["embedded-quick"]
    changed = scenario.changed(arms=("eager",), repetitions=5, config={"rank": 4, "batch_size": 8})
    assert (changed.arms, changed.repetitions) == (("eager",), 5)
    assert (changed.config.lora.rank, changed.config.batch_size) == (4, 8)
    assert changed.config.learning_rate == scenario.config.learning_rate
    assert scenario.changed() == scenario
    for bad in ({"batchsize": 8}, {"steps": 8}, {"rank": 0}, {"batch_size": 6, "micro_batch": 4}):
        with pytest.raises(ConfigError):
            scenario.changed(config=bad)
    with pytest.raises(FastftError):
        scenario.changed(arms=("nothing",))


@given(st.integers(0, 100), st.lists(st.integers(0, 2**31), min_size=1, max_size=5))
def test_repetitions_go_round_the_seeds(repetition, seeds):
    scenario = Scenario(name="x", config={}, steps=2, seeds=tuple(seeds))
    assert scenario.seed(repetition) == seeds[repetition % len(seeds)]
