import pytest
import torch

from fastft.config import RunConfig
from fastft.errors import BackendError, ConfigError
from fastft.training.optimizers import OPTIMIZERS, make_optimizer


def test_adamw_is_pytorchs(device):
    """The fused kernel against the plain one, with decay."""
    start = torch.randn(5, 3, device=device)
    fused, plain = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        make_optimizer("adamw", [fused], learning_rate=0.01, weight_decay=0.1),
        torch.optim.AdamW([plain], lr=0.01, weight_decay=0.1, fused=False),
    ]
    for _ in range(4):
        gradient = torch.randn(5, 3, device=device)
        for parameter, optimizer in zip((fused, plain), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
    assert not torch.equal(fused, start)


def test_any_iterable_of_parameters_will_do():
    module = torch.nn.Linear(2, 2)
    optimizer = make_optimizer("adamw", module.parameters(), learning_rate=1e-3)
    assert len(optimizer.param_groups[0]["params"]) == 2
    assert optimizer.param_groups[0]["weight_decay"] == 0


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_states_need_a_gpu(name):
    with pytest.raises(BackendError, match=rf"optimizer {name} needs a CUDA GPU.*fix: choose adamw"):
        make_optimizer(name, [torch.nn.Parameter(torch.ones(2))], learning_rate=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [64, 1024])
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_states_on_a_gpu(name, rows, device):
    parameter = torch.nn.Parameter(torch.ones(rows, 128, device=device))
    optimizer = make_optimizer(name, [parameter], learning_rate=0.1)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(parameter, torch.full_like(parameter, 0.9), rtol=1e-2, atol=1e-2)


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer is unknown; got adam;.*did you mean 'adamw'"):
        make_optimizer("adam", [], learning_rate=1e-3)


def test_the_configuration_knows_the_same_names():
    assert set(RunConfig.model_fields["optimizer"].annotation.__args__) == set(OPTIMIZERS)
