"""What `benchmark.py` is made of.

`ours` and `theirs` are programs that the benchmark starts as processes of their own, each in its own interpreter: the
same cases, here and in torchvision. `worker` is their end of the conversation and `process` the benchmark's. `rows_*`
say what is measured, `tables` writes it.
"""
