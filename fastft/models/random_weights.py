"""Models of a shape alone, with random weights."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


def random_model(config: Any, dtype: torch.dtype, device: str, seed: int, **more: Any) -> Any:
    """A causal language model of `config`, initialised from `seed` as its family is; `more` goes to `from_config`."""
    import transformers

    torch.manual_seed(seed)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **more).to(device)


def random_quantized_model(
    config: Any, quantization: Any, dtype: torch.dtype, device: str, seed: int, **more: Any
) -> Any:
    """As `random_model`, and quantized by bitsandbytes; of the matrices that it quantizes, one at a time is dense.

    The model goes through the hands of transformers' own quantizer, as in `from_pretrained`, so PEFT and the trainers
    know it by what they know a loaded one by.

    Args:
        config: the model's; it is not changed.
        quantization: transformers' `BitsAndBytesConfig`.
        dtype: of what is not quantized, and of the matrices before they are.
        device: cpu or cuda.
        seed: of the weights; they differ from those of `random_model`.
        more: further arguments of `from_config`.
    """
    import transformers
    from transformers.quantizers import AutoHfQuantizer

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, **more)
    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.validate_environment(device_map={"": device})
    quantizer.preprocess_model(model, dtype=dtype, device_map={"": device})
    torch.manual_seed(seed)
    made: dict[Tensor, nn.Parameter] = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if quantizer.param_needs_quantization(model, f"{name}.weight"):
                _quantize_random(model, name, module, quantizer.get_quantize_ops(), dtype, device)
            else:
                _materialise(module, device, made)
                model._init_weights(module)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model


def _quantize_random(model: Any, name: str, module: Any, quantize: Any, dtype: torch.dtype, device: str) -> None:
    """Give the quantized linear layer `module`, called `name`, the weight and bias of a random dense one."""
    sizes = module.in_features, module.out_features
    dense = nn.Linear(*sizes, bias=module.bias is not None, dtype=dtype, device="meta").to_empty(device=device)
    model._init_weights(dense)
    weight = f"{name}.weight"
    module.weight = quantize.convert({weight: dense.weight.data}, full_layer_name=weight, model=model)[weight]
    if dense.bias is not None:
        module.bias = dense.bias.requires_grad_(False)


def _materialise(module: nn.Module, device: str, made: dict[Tensor, nn.Parameter]) -> None:
    """Put the module's own tensors on `device`, unwritten; tied parameters, which `made` remembers, stay tied."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter not in made:
            made[parameter] = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
        module.register_parameter(name, made[parameter])
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = torch.empty_like(buffer, device=device)
