"""Files that appear complete or not at all."""

from ._files import whole_file as whole_file, write_json as write_json
