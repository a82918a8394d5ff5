"""A CPU and a GPU as large as an H200, for tests that only calculate."""

from fastft.hardware import Device

CPU = Device("cpu", "C", None, None, 2**35, 2)
GPU = Device("cuda", "H", "9.0", 132, 140 * 2**30, 8)
