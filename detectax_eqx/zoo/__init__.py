"""Detectors by name."""

from ._detectors import build as build, names as names
