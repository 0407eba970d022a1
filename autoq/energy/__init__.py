"""Energy: how much work a model's step is, what it costs in joules, and meters that measure it. No torch.

`work` counts operations and bytes from a model's skeleton, `estimate` prices them by published
constants, `meters` reads the counters of the machine (RAPL, NVML).
"""
