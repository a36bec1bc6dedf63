"""Lists the detectors and their published weights.

    python experiments/list_detectors.py

Published weights are downloaded on first use, for example by `predict.py --model NAME street.jpg`.
"""

import tyro

from detectax_eqx import zoo


def main() -> None:
    """Prints one line per detector."""
    print(f"{'detector':<44}{'box AP':>8}{'mask AP':>9}{'MB':>6}  published by")
    for name in dict.fromkeys((*zoo.names(), *zoo.published_names())):
        if name not in zoo.published_names():
            print(name)
            continue
        weights = zoo.published(name)
        mask_ap = "" if weights.mask_ap is None else f"{weights.mask_ap:.1f}"
        source = f"{weights.source} ({weights.licence}), {weights.file}"
        print(f"{name:<44}{weights.box_ap:>8.1f}{mask_ap:>9}{weights.megabytes:>6.0f}  {source}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
