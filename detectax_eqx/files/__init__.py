"""Writes files atomically."""

from ._files import whole_file as whole_file, write_json as write_json
