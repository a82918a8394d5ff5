"""What stands between a layer's wide products, with the adapters of those products in the same pass over memory.

A rank-R term added to a T × F output by itself reads and writes the whole of it again.  Here the kernel that reads the
output anyway adds the term, and the kernel that has the gradients at hand sums those of the adapters.  There is no
`reference.py`: in plain PyTorch an adapter is cheapest added where it is made (`lora_linear`).
"""
