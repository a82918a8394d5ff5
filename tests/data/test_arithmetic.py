import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.data.arithmetic import (
    LARGEST,
    MAX_ROWS,
    Problem,
    final_answer,
    generate,
    is_correct,
    problems,
    split_of,
    write_jsonl,
)
from fastft.data.corpus import documents
from fastft.data.wordings import WORDINGS
from fastft.errors import DataError
from fastft.files import sha256_of

SEEDS = st.integers(min_value=0, max_value=2**32)


def _value(problem: Problem) -> int:
    """The answer by another way than `Problem.equations`: Python's own evaluation, from left to right."""
    expression = str(problem.numbers[0])
    for operator, number in zip(problem.operators, problem.numbers[1:], strict=True):
        expression = f"({expression}) {operator.replace('×', '*')} {number}"
    return int(eval(expression, {"__builtins__": {}}))


def _identity(problem: Problem) -> tuple[str, tuple[int, ...]]:
    return problem.operators, problem.numbers


FIRST_TEST_ROW = {
    "instruction": "Solve the problem. Write one calculation on each line and then the answer after ####.",
    "input": "Jack has 6 eggs. Sam gives Jack 44 more eggs. How many eggs does Jack have now?",
    "output": "6 + 44 = 50 eggs\n#### 50",
}
TEST_ROWS_SHA256 = "eca6baf9ecadaeb9c074559f91a605a3add528a2cc51425b26b908c514e9bfef"


@given(seed=SEEDS)
@settings(max_examples=15)
def test_equal_arguments_give_equal_rows(seed: int) -> None:
    assert generate("train", 20, seed=seed) == generate("train", 20, seed=seed)
    assert generate("train", 20, seed=seed)[:5] == generate("train", 5, seed=seed)


def test_these_rows_stay_what_they_are() -> None:
    """Published scores refer to these rows: a change of them is a change of the benchmark."""
    rows = generate("test", 256)
    assert rows[0] == FIRST_TEST_ROW
    assert sha256_of(rows) == TEST_ROWS_SHA256


def test_seeds_give_other_rows() -> None:
    assert generate("train", 20, seed=1) != generate("train", 20, seed=2)
    assert generate("train", 20) != generate("test", 20)


@given(train_seed=SEEDS, test_seed=SEEDS)
@settings(max_examples=10)
def test_train_and_test_share_no_problem(train_seed: int, test_seed: int) -> None:
    train, test = problems("train", 150, seed=train_seed), problems("test", 150, seed=test_seed)
    assert not {_identity(p) for p in train} & {_identity(p) for p in test}
    assert {split_of(*_identity(p)) for p in train} == {"train"}
    assert {split_of(*_identity(p)) for p in test} == {"test"}


@given(
    start=st.sampled_from(["+", "++", "×", "+-", "+×", "×+"]),
    numbers=st.lists(st.integers(2, 99), min_size=3, max_size=3),
)
def test_swapping_what_may_be_swapped_stays_in_the_split(start: str, numbers: list[int]) -> None:
    given_numbers = numbers[: len(start) + 1]
    swapped = [given_numbers[1], given_numbers[0], *given_numbers[2:]]
    assert split_of(start, given_numbers) == split_of(start, swapped)


def test_order_matters_where_it_matters() -> None:
    """If every order were sorted away, 9 - 4 and 4 - 9 would always agree; over many pairs they do not."""
    assert any(split_of("-", [a, b]) != split_of("-", [b, a]) for a in range(2, 30) for b in range(2, a))


@given(seed=SEEDS, split=st.sampled_from(["train", "test"]))
@settings(max_examples=10)
def test_the_worked_answers_are_right(seed: int, split: str) -> None:
    for problem in problems(split, 100, seed=seed):  # type: ignore[arg-type]
        row = problem.row()
        *steps, last = row["output"].splitlines()
        assert last == f"#### {_value(problem)}"
        assert len(steps) == len(problem.operators)
        left = problem.numbers[0]
        for step, operator, right in zip(steps, problem.operators, problem.numbers[1:], strict=True):
            equation, result = step.split(" = ")
            assert equation == f"{left} {operator} {right}"
            left = int("".join(character for character in result if character.isdigit()))
            assert left == eval(equation.replace("×", "*"), {"__builtins__": {}})
            assert 2 <= left <= LARGEST
        assert all(str(number) in row["input"] for number in problem.numbers)
        assert str(problem.answer) in problem.conclusion
        assert "{" not in "".join(row.values()) + problem.conclusion


def test_rows_are_distinct_and_every_kind_occurs() -> None:
    for split in ("train", "test"):
        found = problems(split, 2000)
        assert len({problem.row()["input"] for problem in found}) == 2000
        kinds = Counter((problem.language, problem.operators) for problem in found)
        assert set(kinds) == {(language, operators) for language in WORDINGS for operators in WORDINGS[language]}
        assert min(kinds.values()) > 50


def test_rows_have_exactly_the_three_keys() -> None:
    for row in generate("train", 50):
        assert list(row) == ["instruction", "input", "output"]
        assert all(isinstance(value, str) and value for value in row.values())


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("12 + 7 = 19\n#### 19", "19"),
        ("####19", "19"),
        ("#### 1,234", "1234"),
        ("#### 007", "7"),
        ("#### -5 apples", "-5"),
        ("#### 8\n#### 9", "8"),
        ("### 8", None),
        ("#### apples 8", None),
        ("The answer is 19.", None),
        ("", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_is_correct_compares_the_number_only() -> None:
    row = {"instruction": "i", "input": "q", "output": "40 + 2 = 42\n#### 42"}
    assert is_correct("anything\n#### 42", row)
    assert not is_correct("40 + 2 = 42\n#### 43", row)
    assert not is_correct("40 + 2 = 42", row)
    with pytest.raises(DataError, match="no final answer"):
        is_correct("#### 42", {**row, "output": "42"})


@pytest.mark.parametrize("count", [0, -1, MAX_ROWS + 1])
def test_impossible_counts_are_refused(count: int) -> None:
    with pytest.raises(DataError, match="count"):
        generate("train", count)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match="split is unknown; got dev"):
        generate("dev", 1)  # type: ignore[arg-type]


def test_jsonl_round_trip(tmp_path: Path) -> None:
    rows = generate("train", 30)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_the_corpus_does_not_give_the_task_away() -> None:
    """No worked answer behind ####, no instruction of the task, and no story of the test split."""
    corpus = list(documents(4000, seed=3))
    assert corpus == list(documents(4000, seed=3))
    text = "\n".join(corpus)
    assert "####" not in text
    for row in generate("test", 500):
        assert row["instruction"] not in text
    assert not any(problem.story in text for problem in problems("test", 500))
    assert sum(problem.story in text for problem in problems("train", 500, seed=3)) > 200  # so the check can fail
