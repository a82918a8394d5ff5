"""PEFT's modules, read as tensors: what the engine needs of an adapted linear layer."""
