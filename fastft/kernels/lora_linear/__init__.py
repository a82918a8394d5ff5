"""Linear layers that share an input, each with its LoRA, in forward and backward."""
