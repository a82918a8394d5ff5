import pytest

from bench.grid import make_header
from bench.trial_file import Header, TrialFile
from fastft.config import RunConfig
from fastft.errors import ConfigError, DataError, OutputError
from fastft.hardware import detect_device
from fastft.plan import Choices, Trial
from fastft.planning import model_shape

CONFIG = RunConfig(model="toy-llama", batch_size=2, sequence_tokens=16, device="cpu")


def header(config: RunConfig = CONFIG, **settings) -> Header:
    return make_header(config, model_shape(config), detect_device("cpu"), settings)


def trial(micro_batch: int = 1) -> Trial:
    choices = Choices(backend="eager", micro_batch=micro_batch, accumulation=1, placement=["light"] * 3)
    return Trial(choices=choices, verdict="ok", step_time_ms=[1.0, 2.0], detail="U+2028 ends no line: \u2028.")


def test_what_is_appended_is_there_in_order(tmp_path):
    file = TrialFile(tmp_path / "new" / "grid.jsonl")
    assert file.trials() == []
    begun = file.begin(header(parts=4))
    for size in (1, 2):
        file.append(trial(size))
    again = TrialFile(file.path)
    assert again.begin(header(parts=4)) == begun
    assert again.trials() == [trial(1), trial(2)]
    assert again.header().settings == {"parts": 4}


@pytest.mark.parametrize("torn", [b'{"choices": {"backend"', b"\xff\xfe", b"{}"])
def test_a_torn_line_is_not_counted_and_swallows_no_other(torn, tmp_path):
    file = TrialFile(tmp_path / "grid.jsonl")
    file.begin(header())
    file.append(trial(1))
    with file.path.open("ab") as stream:
        stream.write(torn)
    file.append(trial(2))
    assert file.trials() == [trial(1), trial(2)]


def test_another_run_or_other_settings_are_refused_and_named(tmp_path):
    file = TrialFile(tmp_path / "grid.jsonl")
    file.begin(header(parts=4))
    with pytest.raises(ConfigError, match=r"another run.*sequence_tokens: plan 16, this run 32"):
        file.begin(header(CONFIG.model_copy(update={"sequence_tokens": 32}), parts=4))
    with pytest.raises(ConfigError, match="parts 4 there, 2 here"):
        file.begin(header(parts=2))


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "grid.jsonl"
    for text in ("{}\n", "nothing\n", '{"schema_version": 1}\n'):
        path.write_text(text)
        with pytest.raises(DataError, match="no file of trials"):
            TrialFile(path).begin(header())
        assert path.read_text() == text, "it is not written to"


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        TrialFile(tmp_path / "file" / "grid.jsonl").append(trial())
