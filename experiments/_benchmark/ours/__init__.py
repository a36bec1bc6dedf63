"""This project's side of the benchmark."""
