"""Workarounds for compilers, and nothing else. README.md gives the reason for each and how to measure it."""

from ._attention import attend as attend
from ._by_example import by_example as by_example
from ._chunks import map_chunks as map_chunks
from ._convolution import convolve as convolve
from ._groups import convolve_groups as convolve_groups
from ._max_pool import max_pool as max_pool
from ._named import named_call as named_call
from ._options import convolution_options as convolution_options, step_compiler_options as step_compiler_options
from ._plain import TRICKS as TRICKS, by_platform as by_platform, plain_operations as plain_operations
from ._pooling import Taps as Taps, lay_out as lay_out, pool as pool
from ._rematerialise import rematerialise as rematerialise, rematerialise_stem as rematerialise_stem
from ._rounding import rounded_product as rounded_product, rounded_quotient as rounded_quotient
from ._stripes import draw_stripes as draw_stripes
from ._undivided import undivided as undivided
from ._unvmap import unvmap_max as unvmap_max
from ._varying import erf as erf, varying_like as varying_like
