"""Detectors by name, their published weights, and `Predictor`, a model with its categories and image sizes."""

from ._about import canvases as canvases
from ._architecture import NORMS as NORMS, Architecture as Architecture, NormName as NormName
from ._detectors import build as build, names as names
from ._download import cache_folder as cache_folder
from ._prediction import Prediction as Prediction
from ._predictor import Predictor as Predictor
from ._published import (
    Published as Published,
    pretrained as pretrained,
    published as published,
    published_names as published_names,
)
from ._run import run_metadata as run_metadata
from ._weights import initialize as initialize
