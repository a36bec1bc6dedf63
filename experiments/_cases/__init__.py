"""The cases that `benchmark.py` measures. Each module runs as a separate process, in its own interpreter.

`ours` and `theirs` define the same cases, for this project and torchvision, and serve them with `_benchmark.worker`.
"""
