"""`undo()` leaves nothing behind: not in the libraries, not in PyTorch's global hooks, not in the models."""

import copy
import gc
import re
import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple

import datasets
import peft
import pytest
import tokenizers
import torch
import torch.nn.modules.module as module_hooks
import torch.optim.optimizer as optimizer_hooks
import transformers
import trl
from torch import nn

import fastft
from fastft import ledger_of, patch_hf_training
from fastft.engine.patch import forget_the_gone

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

LIBRARIES = {"torch", "transformers", "peft", "trl", "accelerate"}
FASTFT = str(Path(fastft.__file__).parent)
VOCABULARY = 64
LORA = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
NOTHING = object()

CHANGES_ANYWAY = re.compile(
    "|".join(
        (
            r".*\.__warningregistry__\..*",  # Python's own list of the warnings that a module gave
            r"torch\.utils\.hooks\.RemovableHandle\.next_id",  # counts all hooks that there ever were
            r"accelerate\.state\.\w+\._shared_state\..*",  # singletons, filled anew by every trainer
            # What the compiler counts, remembers and logs of the code that it saw.
            r"torch\.(_dynamo|_subclasses|_logging|utils\._stats)\..*",
            # Names that Dynamo puts in the globals of what it compiled: of modules and constants that the compiled code
            # reaches, and of that code itself, which goes when it is collected.
            r".*\.(_(\w+_)?\d+_c\d+|__(import|builtins_dict|compiled_fn|resume_at)_\w+)",
        )
    )
)
"""What a run without fastft changes too, once its lazy imports are done: `test_stock_changes_the_same` says so."""


class Run(NamedTuple):
    """What there is after somebody trained."""

    models: Sequence[Any]
    """All of them that can be trained further."""
    gone: Sequence[Any] = ()
    """What they no longer are: stays alive and has to be clean too."""
    passed_on: frozenset[str] = frozenset()
    """fastft's functions that somebody's wrapper found on the model and goes on calling; they hand on to stock."""


Way = Callable[[Path], Run]


def make_base() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(config)


def make_model() -> Any:
    return peft.get_peft_model(make_base(), peft.LoraConfig(**LORA)).train()


def backward(model: Any) -> None:
    ids = torch.arange(2, 24).view(2, 11)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def make_step(model: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()


def sft_trainer(folder: Path) -> Run:
    vocabulary = {"<pad>": 0, "<eos>": 1, **{str(token): token for token in range(2, VOCABULARY)}}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    trainer = trl.SFTTrainer(
        model=make_base(),
        args=trl.SFTConfig(
            output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no",
            disable_tqdm=True, use_cpu=True, bf16=False,
        ),
        train_dataset=datasets.Dataset.from_list([{"input_ids": [2 + n, 7, 9, 11 + n, 1]} for n in range(4)]),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
        ),
        peft_config=peft.LoraConfig(**LORA),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2
    # TRL's head with chunked loss keeps the bound `forward` that it found, and nobody can take that from it.
    return Run(
        [trainer.model],
        passed_on=frozenset({"attach.__call__", "attach.__self__", "head.causal_lm_forward", "state.call_original"}),
    )


def merge_and_unload(folder: Path) -> Run:
    model = make_model()
    make_step(model)
    return Run([model.merge_and_unload()], gone=[model])


def gradient_checkpointing(folder: Path) -> Run:
    model = make_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    make_step(model)
    return Run([model])


def optimizer_steps(folder: Path) -> Run:
    model = make_model()
    make_step(model)
    make_step(model)
    return Run([model])


def deep_copies(folder: Path) -> Run:
    """Of a model that has not run yet, of one that made a step and is gone, and of a copy."""
    model = make_model()
    early = copy.deepcopy(model)
    make_step(model)
    late = copy.deepcopy(model)
    of_a_copy = copy.deepcopy(late)
    for each in (early, late, of_a_copy):
        make_step(each)
    return Run([early, late, of_a_copy, copy.deepcopy(early.get_base_model())])


def one_of_two_deleted(folder: Path) -> Run:
    model, other = make_model(), make_model()
    make_step(model)
    make_step(other)
    is_there = weakref.ref(other)
    del other
    gc.collect()
    assert is_there() is None
    return Run([model])


def all_deleted(folder: Path) -> Run:
    one_of_two_deleted(folder)
    gc.collect()
    return Run([])


def compiled(folder: Path) -> Run:
    model = make_model()
    fast = torch.compile(model, backend="eager")
    make_step(fast)
    return Run([fast, model])


WAYS: tuple[Way, ...] = (
    sft_trainer, merge_and_unload, gradient_checkpointing, optimizer_steps, deep_copies, one_of_two_deleted,
    all_deleted, compiled,
)  # fmt: skip


class Held(NamedTuple):
    owner: Any
    """Kept, so that no other object gets its id."""
    name: str
    holds: dict[Any, Any]


def is_of_the_libraries(name: Any) -> bool:
    return isinstance(name, str) and name.partition(".")[0] in LIBRARIES


def is_fastfts(value: Any) -> bool:
    """Whether a function, method, class or object is made of fastft's code."""
    function = getattr(value, "__func__", getattr(value, "func", value))
    return any(
        str(getattr(each, "__module__", None)).partition(".")[0] == "fastft"
        for each in (function, getattr(function, "__wrapped__", None), type(value))
    )


def snapshot() -> dict[int, Held]:
    """All attributes of all the libraries' modules and classes.

    A dict, list or set among them counts with what it holds: hooks and registrations change no attribute.
    """
    held: dict[int, Held] = {}

    def add(owner: Any, name: str) -> None:
        if id(owner) in held:
            return
        attributes = dict(vars(owner))
        held[id(owner)] = Held(owner, name, attributes)
        for key, value in attributes.items():
            if isinstance(value, type) and is_of_the_libraries(value.__module__):
                add(value, f"{value.__module__}.{value.__qualname__}")
            elif type(value) in (dict, OrderedDict):
                held.setdefault(id(value), Held(value, f"{name}.{key}", dict(value)))
            elif type(value) in (list, set):
                held.setdefault(id(value), Held(value, f"{name}.{key}", dict(enumerate(value))))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # to look at some classes is deprecated
        for name, module in list(sys.modules.items()):
            if is_of_the_libraries(name) and isinstance(module, ModuleType):
                add(module, name)
    return held


def changes(before: dict[int, Held], after: dict[int, Held]) -> list[str]:
    """What is not the same object any more, is new, or is missing."""
    found = []
    for key, (_, name, old) in before.items():
        new = after[key].holds if key in after else {}
        for attribute in {**old, **new}:
            was, now = old.get(attribute, NOTHING), new.get(attribute, NOTHING)
            path = f"{name}.{attribute}"
            if was is not now and (is_fastfts(now) or not CHANGES_ANYWAY.fullmatch(path)):
                found.append(f"{path}: {was!r:.60} -> {now!r:.60}")
    return found


def global_hooks() -> dict[str, Any]:
    """Those that watch every optimizer or every module, by the name of their registry."""
    return {
        name: list(value.items()) if isinstance(value, dict) else value
        for where in (optimizer_hooks, module_hooks)
        for name, value in vars(where).items()
        if name.startswith("_global_")
    }


def left_on(model: nn.Module) -> list[str]:
    """The attributes of fastft on the modules of a model and on their parameters, hooks included."""
    found = []
    for name, module in model.named_modules():
        for owner in (module, *module._parameters.values()):
            for key, value in vars(owner).items() if owner is not None else ():
                inside = value.values() if isinstance(value, dict) else ()
                if str(key).startswith("_fastft") or any(map(is_fastfts, (value, *inside))):
                    found.append(f"{name}.{key}")
        if is_fastfts(type(module)):
            found.append(f"{name}: {type(module)}")
    return found


def code_of_fastft_in(run: Callable[[], Any]) -> set[str]:
    """The functions of fastft that are called in `run`, by whatever way."""
    called = set()

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(FASTFT):
            called.add(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(before)
    return called


@pytest.fixture(scope="module", autouse=True)
def _lazy_imports_are_done(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Everything once without fastft: the libraries import much of themselves when it is first used."""
    for way in WAYS:
        way(tmp_path_factory.mktemp("stock"))
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    # Another test's patched model, deleted as it was, leaves the hooks on until something is unpatched.
    gc.collect()
    forget_the_gone()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_stock_changes_the_same(way: Way, tmp_path: Path) -> None:
    """What is excluded is nothing of fastft's, and nothing is missing from it."""
    before, hooks = snapshot(), global_hooks()
    run = way(tmp_path)
    assert changes(before, snapshot()) == []
    assert global_hooks() == hooks
    assert [line for model in run.models for line in left_on(model)] == []


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_undo_leaves_nothing(way: Way, tmp_path: Path) -> None:
    before, hooks = snapshot(), global_hooks()
    with patch_hf_training(backend="eager", strict=True) as patch:
        run = way(tmp_path)
        assert any("PeftModel.__init__" in line for line in changes(before, snapshot())), "the snapshot sees a patch"
        assert any(map(is_fastfts, optimizer_hooks._global_optimizer_pre_hooks.values()))
        for model in run.models:
            assert "decoder_layer: fused (eager)" in ledger_of(getattr(model, "_orig_mod", model)).counts()
            assert left_on(model)
        patch.undo()

    def nothing_is_left() -> None:
        assert changes(before, snapshot()) == []
        assert global_hooks() == hooks
        assert [line for model in (*run.models, *run.gone) for line in left_on(model)] == []

    nothing_is_left()
    for model in run.models:
        model.requires_grad_(True)  # a merged one has nothing else to train
        assert code_of_fastft_in(lambda model=model: make_step(model)) == run.passed_on
    nothing_is_left()
