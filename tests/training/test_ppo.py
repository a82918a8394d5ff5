"""PPO: what the trainer promises beside its formulas."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastft import PPOConfig, ledger_of
from fastft.errors import ConfigError, DataError, FastftError, ModelError
from fastft.training.methods.ppo_models import Sequences, add_token_scores, score_tokens
from ppo_runs import (
    PROMPTS,
    TINY,
    TOKENIZER,
    base,
    classifier,
    digits,
    fused,
    logs,
    lora,
    make,
    settings,
    trained_state,
)

METRICS = {
    "eps", "objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward",
    "objective/scores", "policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg",
    "val/clipfrac_avg", "policy/entropy_avg", "val/ratio", "val/ratio_var", "val/num_eos_tokens", "lr", "episode",
}  # fmt: skip
"""TRL 1.10's."""
TRL_DEFAULTS = {
    "learning_rate": 3e-6, "logging_steps": 10, "gradient_checkpointing": True, "num_mini_batches": 1,
    "total_episodes": None, "local_rollout_forward_batch_size": 64, "num_sample_generations": 10,
    "response_length": 53, "stop_token": None, "stop_token_id": None, "temperature": 0.7, "missing_eos_penalty": None,
    "sft_model_path": "EleutherAI/pythia-160m", "reward_model_path": "EleutherAI/pythia-160m",
    "num_total_batches": None, "micro_batch_size": None, "local_batch_size": None, "batch_size": None,
    "local_mini_batch_size": None, "mini_batch_size": None, "push_to_hub": False, "model_adapter_name": None,
    "ref_adapter_name": None, "num_ppo_epochs": 4, "whiten_rewards": False, "kl_coef": 0.05, "kl_estimator": "k1",
    "cliprange": 0.2, "vf_coef": 0.1, "cliprange_value": 0.2, "gamma": 1.0, "lam": 0.95, "dataset_num_proc": None,
    "ds3_gather_for_generation": True,
}  # fmt: skip


def test_arguments_and_defaults_are_trls(tmp_path):
    args = PPOConfig(output_dir=str(tmp_path), use_cpu=True)
    assert {name: getattr(args, name) for name in TRL_DEFAULTS} == TRL_DEFAULTS
    assert (args.bf16, args.world_size) == (True, 1)
    assert not PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False).bf16


def test_sizes_follow_from_other_arguments(tmp_path):
    args = settings(
        tmp_path, gradient_accumulation_steps=4, per_device_train_batch_size=2, num_mini_batches=2, max_steps=-1,
        num_train_epochs=2,
    )  # fmt: skip
    args.resolve(prompts=10, processes=3)
    found = args.total_episodes, args.batch_size, args.local_batch_size, args.micro_batch_size, args.mini_batch_size
    assert found == (20, 24, 8, 6, 12)
    assert (args.local_mini_batch_size, args.num_total_batches) == (4, 1)
    args.resolve(prompts=100, processes=1)  # the same arguments once more
    assert (args.total_episodes, args.batch_size, args.num_total_batches) == (200, 8, 25)


# ---- A first step ----


@pytest.mark.parametrize("fast", [False, True], ids=["stock", "fused"])
def test_the_first_minibatch_is_the_rollout(fast, tmp_path):
    """While B is zero the policy is its reference, and nothing was stepped yet."""
    with fused(fast):
        trainer = make(tmp_path, num_ppo_epochs=1, max_steps=1)
        trainer.train()
    [log] = logs(trainer)
    assert log["objective/kl"] == 0
    assert log["val/ratio"] == 1
    assert log["policy/approxkl_avg"] == 0
    assert log["policy/clipfrac_avg"] == log["val/clipfrac_avg"] == 0
    assert log["loss/policy_avg"] == pytest.approx(0, abs=1e-6)  # whitened advantages


@pytest.mark.parametrize("fast", [False, True], ids=["stock", "fused"])
def test_both_adapters_and_the_head_are_trained_and_nothing_else(fast, tmp_path):
    with fused(fast):
        trainer = make(tmp_path, gradient_checkpointing=True)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        ledger = ledger_of(trainer.model.policy)
    after = dict(trainer.model.named_parameters())
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {name for name in before if "lora_" in name or "value_head" in name}
    assert trainer.state.log_history[-1].keys() >= METRICS
    assert trainer.model.policy.active_adapter == "default"
    assert (ledger is not None) == fast
    if ledger is not None:
        assert not ledger.fallbacks
        assert {path.path for path in ledger.paths.values()} == {"fused (eager)"}


def test_no_pass_has_all_logits(tmp_path, monkeypatch):
    with fused(True):
        trainer = make(tmp_path, max_steps=1)
        trainer.model.policy.get_base_model().__dict__["_fastft"].settings.loss_chunk_tokens = 4
        rows = list(trainer.train_dataset)[:4]
        answered = trainer.actor._sample([row["input_ids"] for row in rows], greedy=True)  # stock's, a token at a time
        monkeypatch.setattr(trainer.actor, "_sample", lambda prompts, greedy: answered)
        shapes: list[tuple[int, ...]] = []
        product = torch.mm
        monkeypatch.setattr(torch, "mm", lambda *a, **k: (made := product(*a, **k), shapes.append(made.shape))[0])
        trainer.train()
        assert ledger_of(trainer.model.policy).paths["lm_head"].path == "fused (eager)"
    rows_of_logits = [shape[0] for shape in shapes if shape[1] == trainer.model.config.vocab_size]
    assert max(rows_of_logits) == 4
    assert len(rows_of_logits) > 4 * 3  # policy and reference of the rollout, and two epochs, of some 20 tokens


def test_a_switch_of_adapters_makes_nothing_be_read_anew(tmp_path):
    """Policy, value and reference have a reading each, whatever goes on between them."""
    with fused(True):
        trainer = make(tmp_path, max_steps=3)
        trainer.train()
        read = trainer.model.policy.get_base_model().__dict__["_fastft_read"]
        assert set(read.by_adapters) == {("default",), ("value",), ()}
        assert max(reading.count for reading in read.by_adapters.values()) <= 2


@pytest.mark.parametrize("fast", [False, True], ids=["stock", "fused"])
def test_how_many_rows_go_at_a_time_changes_nothing(fast, tmp_path):
    found = []
    for rows, parts in ((4, 1), (1, 4), (2, 2)):
        with fused(fast):
            trainer = make(
                tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=parts, optim="sgd",
                learning_rate=0.01, local_rollout_forward_batch_size=4,
            )  # fmt: skip
            trainer.train()
        found.append((logs(trainer), trained_state(trainer)))
    for log, state in found[1:]:
        for one, other in zip(found[0][0], log, strict=True):
            assert other == pytest.approx(one, abs=1e-5)
        for name, tensor in found[0][1].items():
            torch.testing.assert_close(state[name], tensor, atol=1e-6, rtol=1e-5)


# ---- Rows ----


@pytest.mark.parametrize("fast", [False, True], ids=["stock", "fused"])
def test_a_rows_scores_do_not_depend_on_its_neighbours(fast):
    """Ragged prompts and responses, an empty one among them."""
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    responses, lengths = torch.tensor([[20, 21, 3, 0], [3, 0, 0, 0], [0, 30, 31, 32]]), torch.tensor([3, 1, 0])
    with fused(fast):
        model = get_peft_model(base(), lora())
        add_token_scores(model, 0.9)
        together = score_tokens(model, Sequences.of(prompts, responses, lengths))
        plain = get_peft_model(base(), lora())
        plain.load_state_dict(model.state_dict())
        for row, (prompt, count) in enumerate(zip(prompts, lengths.tolist(), strict=True)):
            tokens = torch.tensor([prompt + responses[row, :count].tolist()])
            with torch.no_grad():
                log_softmax = (plain(tokens).logits[0] / 0.9).log_softmax(-1)[len(prompt) - 1 : -1]
            expected = log_softmax.gather(1, tokens[0, len(prompt) :, None]).squeeze(1)
            torch.testing.assert_close(together.log_probs_BL[row, :count], expected, atol=1e-5, rtol=1e-5)
            entropy = -(log_softmax.exp() * log_softmax).sum(-1)
            torch.testing.assert_close(together.entropy_BL[row, :count], entropy, atol=1e-5, rtol=1e-5)
            assert not together.log_probs_BL[row, count:].any()
            assert not together.entropy_BL[row, count:].any()


def test_where_things_are_in_a_row():
    sequences = Sequences.of([[5, 6], [7, 8, 9]], torch.tensor([[20, 3, 0], [21, 22, 23]]), torch.tensor([2, 3]))
    assert sequences.ids_BS.tolist() == [[5, 6, 20, 3, 0, 0], [7, 8, 9, 21, 22, 23]]
    assert sequences.labels().tolist() == [[-100, -100, 20, 3, -100, -100], [-100, -100, -100, 21, 22, 23]]
    assert sequences.mask().sum(1).tolist() == [4, 6]
    assert sequences.states().tolist() == [[1, 2, 3], [2, 3, 4]]
    assert sequences.last().tolist() == [3, 5]
    one = sequences.select(torch.tensor([0]))
    assert one.ids_BS.tolist() == [[5, 6, 20, 3]]
    assert one.states().tolist() == [[1, 2, 3]]


def test_padding_on_any_side_by_a_collator_is_the_same(tmp_path):
    from transformers import DataCollatorWithPadding

    found = []
    for side in (None, "left", "right"):
        tokenizer = AutoTokenizer.from_pretrained(TINY, padding_side=side or "right")
        collator = None if side is None else DataCollatorWithPadding(tokenizer)
        trainer = make(tmp_path, data_collator=collator, processing_class=tokenizer, max_steps=1)
        trainer.train()
        found.append(logs(trainer))
    assert found[0] == found[1] == found[2]


class Listening:
    """A reward that keeps what it hears."""

    def __init__(self) -> None:
        self.ids: list[list[int]] = []

    def __call__(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        self.ids += completion_ids
        return [float(len(ids)) for ids in completion_ids]


def test_one_token_for_padding_and_the_end(tmp_path):
    """Its first one ends a response, and counts."""
    tokenizer = AutoTokenizer.from_pretrained(TINY, pad_token="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    seen = []
    for each in (TOKENIZER, tokenizer):
        reward = Listening()
        trainer = make(tmp_path, processing_class=each, max_steps=1, missing_eos_penalty=1.0, reward_funcs=reward)
        trainer.train()
        log = {name: value for name, value in logs(trainer)[0].items() if name != "val/num_eos_tokens"}
        seen.append((reward.ids, log))
    assert any(row[-1] == tokenizer.eos_token_id for row in seen[0][0])
    assert any(len(row) < 6 for row in seen[0][0])
    assert seen[0] == seen[1]


def test_prompts_are_texts_conversations_or_tokens(tmp_path):
    conversation = [{"role": "user", "content": "2 and 3 make"}]
    told: dict[str, Any] = {}

    def reward(
        prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **columns: Any
    ) -> list[float]:
        told.update(prompts=prompts, completions=completions, ids=completion_ids, columns=columns)
        return [0.0] * len(prompts)

    rows = [{"prompt": conversation, "answer": str(number)} for number in range(4)]
    trainer = make(tmp_path, train_dataset=rows, reward_funcs=reward, max_steps=1)
    trainer.train()
    assert told["prompts"] == [conversation] * 4
    assert all([message["role"] for message in answer] == ["assistant"] for answer in told["completions"])
    assert sorted(told["columns"].pop("answer")) == ["0", "1", "2", "3"]
    assert told["columns"].keys() == {"trainer_state", "log_extra", "log_metric"}
    template = TOKENIZER.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert trainer.train_dataset[0]["input_ids"] == template

    rows = [{"input_ids": TOKENIZER("2 and 3 make")["input_ids"]} for _ in range(4)]
    make(tmp_path, train_dataset=rows, reward_funcs=reward, max_steps=1).train()
    assert told["prompts"] == ["2 and 3 make"] * 4
    decoded = TOKENIZER.batch_decode(told["ids"], skip_special_tokens=True)
    assert told["completions"] == decoded


def test_each_epoch_shuffles_anew_and_leaves_no_prompt_twice(tmp_path):
    seen: list[str] = []
    trainer = make(
        tmp_path, max_steps=4, train_dataset=PROMPTS[:9], num_ppo_epochs=1, response_length=2,
        reward_funcs=lambda prompts, **_: (seen.extend(prompts), [0.0] * len(prompts))[1],
    )  # fmt: skip
    trainer.train()
    first, second = seen[:8], seen[8:]
    assert len(set(first)) == len(set(second)) == 8  # of nine: an update takes four
    assert first != second


# ---- Rewards, values and references of their own ----


@pytest.mark.parametrize("fast", [False, True], ids=["stock", "fused"])
def test_a_reward_model_scores_what_was_said(fast, tmp_path):
    with fused(fast):
        reward, plain = classifier(3), classifier(3)
        trainer = make(tmp_path, reward_model=reward)
        rollout = trainer.actor.rollout(list(trainer.train_dataset)[:4])
    sequences = rollout.sequences
    for row, score in enumerate(rollout.scores_B.tolist()):
        ids = sequences.ids_BS[row : row + 1, : int(sequences.last()[row]) + 1]
        with torch.no_grad():
            hidden = plain.model(ids).last_hidden_state
            assert score == pytest.approx(float(plain.score(hidden)[0, -1, 0]), abs=1e-5)
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_rewards_add_up_and_none_does_not_count(tmp_path):
    def sometimes(completions: list[str], log_metric: Any, **_: Any) -> list[float | None]:
        log_metric("seen", len(completions))
        return [None if number % 2 else 1.0 for number in range(len(completions))]

    trainer = make(tmp_path, reward_funcs=[digits, sometimes, classifier()], max_steps=1)
    trainer.train()
    log = trainer.state.log_history[-1]
    assert log["rewards/sometimes/mean"] == 1
    assert log["seen"] == 4
    assert log["objective/scores"] == pytest.approx(
        log["rewards/digits/mean"] + 0.5 + log["rewards/tiny/mean"], abs=1e-5
    )


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda n: [1.0] * (n - 1), "wrong number"),
        (lambda n: [None] * n, "no reward judges"),
        (lambda n: [float("nan")] * n, "no reward judges"),
        (lambda n: [float("inf")] * n, "infinite"),
        (lambda n: ["good"] * n, "no list of numbers"),
        (lambda n: 1.0, "no list of numbers"),
    ],
)
def test_a_function_that_returns_no_rewards(answer, told, tmp_path):
    trainer = make(tmp_path, reward_funcs=lambda completions, **_: answer(len(completions)))
    with pytest.raises(DataError, match=told):
        trainer.train()


@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "whole"])
def test_models_of_their_own_are_used(adapted, tmp_path):
    value, reference = classifier(5), base()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.02)
    before = {name: p.detach().clone() for name, p in value.named_parameters()}
    kept = copy.deepcopy(reference.state_dict())
    trainer = make(
        tmp_path, value_model=value, ref_model=reference, peft_config=lora() if adapted else None, learning_rate=1e-4
    )
    assert trainer.model.value_model is value
    assert trainer.model.value_head is None
    trainer.train()
    assert logs(trainer)[0]["objective/kl"] != 0
    assert all(torch.equal(tensor, kept[name]) for name, tensor in reference.state_dict().items())
    after = dict(value.named_parameters())
    assert sum(not torch.equal(tensor, after[name]) for name, tensor in before.items()) > len(before) - 2
    adapters = set(getattr(trainer.model.policy, "peft_config", {}))
    assert adapters == ({"default"} if adapted else set())


def test_a_whole_policy_has_a_copy_for_its_reference(tmp_path):
    trainer = make(tmp_path, value_model=classifier(), peft_config=None, learning_rate=1e-3)
    kept = copy.deepcopy(trainer.ref_model.state_dict())
    trainer.train()
    first, second = logs(trainer)
    assert first["objective/kl"] == 0
    assert second["objective/kl"] != 0
    assert all(torch.equal(tensor, kept[name]) for name, tensor in trainer.ref_model.state_dict().items())


def test_a_ref_adapter_is_the_reference(tmp_path):
    """Found by its name, or named; the other adapters stay frozen."""
    for name in ("ref", "older"):
        model = get_peft_model(base(), lora())
        model.add_adapter(name, lora())
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(std=0.05)  # the policy is another one than its reference
        kept = {n: p.detach().clone() for n, p in model.named_parameters() if f".{name}." in n}
        trainer = make(
            tmp_path, model=model, peft_config=None, max_steps=1, ref_adapter_name=None if name == "ref" else name
        )
        trainer.train()
        assert logs(trainer)[0]["objective/kl"] != 0
        assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in kept.items())
        copied = {n.replace(f".{name}.", ".default."): tensor for n, tensor in kept.items()}
        model.load_state_dict(copied, strict=False)
        rollout = trainer.actor.rollout(list(trainer.train_dataset)[:4])
        assert rollout.metrics["objective/kl"] == 0


# ---- Files ----


def test_a_saved_policy_is_pefts_and_its_value_lies_beside(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    state = trained_state(trainer)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "saved")
    for name, parameter in loaded.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, state[f"policy.{name}"])
    loaded.load_adapter(tmp_path / "saved" / "value", "value")
    for name, parameter in loaded.named_parameters():
        if ".value." in name:
            assert torch.equal(parameter, state[f"policy.{name}"])
    head = load_file(tmp_path / "saved" / "value" / "value_head.safetensors")
    assert torch.equal(head["weight"], state["value_head.weight"])
    assert not list((tmp_path / "saved").rglob("*.bin"))
    assert not list((tmp_path / "saved").rglob("*.tmp"))


KINDS: dict[str, dict[str, Any]] = {
    "adapters": {},
    "a named adapter": {"model": "named", "peft_config": None},
    "a value model": {"value_model": True},
    "whole": {"value_model": True, "peft_config": None, "learning_rate": 1e-4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_run(kind, tmp_path):
    def run(folder: Path, **more: Any) -> Any:
        given = dict(KINDS[kind])
        if given.pop("value_model", False):
            given["value_model"] = classifier(2)
        if given.pop("model", None):
            torch.manual_seed(4)
            given["model"] = get_peft_model(base(), lora(), adapter_name="mine")
        return make(folder, max_steps=3, save_strategy="steps", save_steps=2, num_mini_batches=2, **given, **more)

    whole = run(tmp_path / "a")
    whole.train()
    resumed = run(tmp_path / "b")
    with torch.no_grad():
        for parameter in resumed.model.trained():
            parameter.add_(0.1)  # all of it has to come from the checkpoint
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert logs(resumed) == logs(whole)
    assert resumed.state.episode == whole.state.episode == 12
    for name, tensor in trained_state(whole).items():
        assert torch.equal(trained_state(resumed)[name], tensor), name


def test_what_is_no_checkpoint_of_this_model(tmp_path):
    trainer = make(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(ConfigError, match="no checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    from peft import LoraConfig

    other = make(tmp_path / "b", peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ModelError, match="cannot resume"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    (tmp_path / "checkpoint-1" / "value" / "value_head.safetensors").unlink()
    with pytest.raises(ModelError, match="value_head"):
        make(tmp_path / "c").train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_best_of_evaluations_is_loaded_at_the_end(tmp_path, capsys):
    trainer = make(
        tmp_path, eval_dataset=PROMPTS[:4], eval_strategy="steps", eval_steps=1, save_strategy="best",
        metric_for_best_model="eval_objective/scores", load_best_model_at_end=True, max_steps=2,
        num_sample_generations=2,
    )  # fmt: skip
    trainer.train()
    assert "model response" in capsys.readouterr().out
    best = Path(trainer.state.best_model_checkpoint)
    loaded = PeftModel.from_pretrained(base(), best)
    state = trained_state(trainer)
    for name, parameter in loaded.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, state[f"policy.{name}"])
    first = trainer.evaluate()
    assert first == trainer.evaluate()
    assert first["eval_objective/scores"] == pytest.approx(trainer.state.best_metric)


def test_evaluating_does_not_change_the_training(tmp_path):
    plain = make(tmp_path)
    plain.train()
    evaluated = make(tmp_path, eval_dataset=PROMPTS[:2], eval_strategy="steps", eval_steps=1)
    evaluated.train()
    updates = [log for log in logs(evaluated) if "objective/kl" in log]
    assert updates == logs(plain)


def test_a_callback_can_stop_it(tmp_path):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = True

    trainer = make(tmp_path, callbacks=[Stop()], max_steps=5)
    assert trainer.train().global_step == 1


def test_it_computes_in_bf16(tmp_path):
    with fused(True):
        trainer = make(tmp_path, bf16=True, max_steps=1, num_ppo_epochs=1)
        trainer.train()
        assert not ledger_of(trainer.model.policy).fallbacks
    [log] = logs(trainer)
    assert (log["objective/kl"], log["val/ratio"]) == (0, 1)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


# ---- Errors ----


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"kl_estimator": "k2"}, "kl_estimator is unknown"),
        ({"stop_token": "period"}, "stop_token is unknown"),
        ({"stop_token_id": 0}, "two names"),
        ({"temperature": 0.0}, "temperature is not valid"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty is not valid"),
        ({"response_length": 0}, "response_length is not valid"),
        ({"num_mini_batches": 3}, "minibatches of one size"),
        ({"whiten_rewards": True}, "whiten_rewards needs more rows"),
        ({"batch_size": 7}, "batch_size follows from other arguments"),
        ({"world_size": 8}, "world_size is the number of processes"),
        ({"total_episodes": 100}, "contradict each other"),
        ({"neftune_noise_alpha": 5.0}, "no use for neftune_noise_alpha"),
        ({"use_liger_kernel": True}, "no use for use_liger_kernel"),
        ({"per_device_train_batch_size": 64}, "fewer prompts than one update"),
        ({"train_dataset": [{"text": "a"}]}, "has no prompts"),
        ({"train_dataset": [{"input_ids": [1]}, {"input_ids": []}]}, "row 1 of train_dataset has an empty prompt"),
        ({"train_dataset": None}, "train_dataset is not usable"),
        ({"peft_config": None}, "no frozen base for the value"),
        ({"reward_funcs": None}, "PPO has no reward"),
        ({"reward_funcs": []}, "PPO has no reward"),
        ({"reward_funcs": ["model"]}, "neither a function nor a model"),
        ({"reward_funcs": digits, "reward_model": digits}, "the same argument"),
        ({"model": TINY}, "not a loaded model"),
        ({"model_adapter_name": "other"}, "model_adapter_name is no adapter"),
        ({"ref_adapter_name": "other"}, "ref_adapter_name is no adapter"),
        ({"ref_adapter_name": "default"}, "one adapter"),
    ],
)
def test_bad_input_is_one_clear_error(given, told, tmp_path):
    with pytest.raises(FastftError, match=told):
        make(tmp_path, **given)


def test_models_that_cannot_be_used(tmp_path):
    two = AutoModelForSequenceClassification.from_pretrained(TINY, num_labels=2)
    with pytest.raises(ModelError, match="reward_model does not score"):
        make(tmp_path, reward_model=two)
    with pytest.raises(ModelError, match="value_model does not score"):
        make(tmp_path, value_model=base())
    model = base()
    with pytest.raises(ConfigError, match="ref_model is another model"):
        make(tmp_path, model=model, ref_model=model)
    adapted = get_peft_model(base(), lora())
    with pytest.raises(ConfigError, match="adapters already"):
        make(tmp_path, model=adapted)
    make(tmp_path, model=adapted, peft_config=None)
    with pytest.raises(ConfigError, match="an adapter 'value' already"):
        make(tmp_path, model=adapted, peft_config=None)
    with pytest.raises(ConfigError, match="cannot have a second adapter"):
        make(tmp_path, peft_config=lora(bias="lora_only"))
    trained = get_peft_model(base(), lora())
    trained.get_input_embeddings().weight.requires_grad_()
    with pytest.raises(ConfigError, match="is trained, too"):
        make(tmp_path, model=trained, peft_config=None)
    from peft import LoraConfig

    head = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="the head has an adapter"):
        make(tmp_path, peft_config=head)


def test_a_models_own_way_to_generate_is_not_the_policys(tmp_path):
    """What it samples from is what is trained."""
    model = base()
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.suppress_tokens = list(range(1000))
    found = []
    for each in (None, model):
        trainer = make(tmp_path, model=each, max_steps=1)
        trainer.train()
        found.append(logs(trainer))
    assert found[0] == found[1]
    assert model.generation_config.repetition_penalty == 5.0


@pytest.mark.slow
def test_two_processes_keep_one_model(tmp_path):
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1] / "helpers")!r})
import hashlib, pathlib
from ppo_runs import make
trainer = make(pathlib.Path({str(tmp_path)!r}), per_device_train_batch_size=2, use_cpu=True)
trainer.train()
assert trainer.args.batch_size == 4 and trainer.args.local_batch_size == 2
weights = b"".join(p.detach().numpy().tobytes() for p in trainer.model.trained())
# Not printed: two processes' lines may come as one.
digest = pathlib.Path({str(tmp_path)!r}) / f"model-{{trainer.args.process_index}}.txt"
digest.write_text(hashlib.sha256(weights).hexdigest())
"""
    (tmp_path / "run.py").write_text(program)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(tmp_path / "run.py"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    first, second = ((tmp_path / f"model-{rank}.txt").read_text() for rank in range(2))
    assert first == second
