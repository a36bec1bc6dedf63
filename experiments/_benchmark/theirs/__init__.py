"""torchvision's side of the benchmark."""
