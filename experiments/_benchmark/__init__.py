"""The harness of `benchmark.py`.

`bench` starts a process for each side (`worker` is that process's end; its cases are in `_cases`), `agreement` compares
their results, and times them in turn. `rows_*` list the measured rows, `inputs` draws what they work on. `tables`
keeps measurements as JSON lines, and `pages` renders them.
"""
