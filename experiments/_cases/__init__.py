"""The cases that `benchmark.py` measures: programs that it starts as processes of their own, each in its interpreter.

`ours` and `theirs` are the same cases, here and in torchvision. `_benchmark.worker` is their end of the conversation.
"""
