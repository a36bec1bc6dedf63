"""The harness of `benchmark.py`.

`bench` starts a process per side and times both in turn; `worker` runs in that process, and its cases are in `_cases`.
`agreement` compares the results of the sides. `rows_*` list the measured rows, and `inputs` draws their inputs.
`tables` stores measurements as JSON lines, and `pages` renders them.
"""
