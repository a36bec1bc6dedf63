"""Lists the detectors and their published weights.

    python experiments/list_detectors.py

Published weights are downloaded on first use, for example by `predict.py --model NAME street.jpg`.
"""

import tyro

from detectax_eqx import zoo


def main() -> None:
    """Prints one line per detector."""
    print(f"{'detector':<44}{'box AP':>8}{'mask AP':>9}{'points AP':>11}{'MB':>6}  published by")
    for name in dict.fromkeys((*zoo.names(), *zoo.published_names())):
        if name not in zoo.published_names():
            print(name)
            continue
        weights = zoo.published(name)
        figures = [f"{ap:.1f}" if ap else "" for ap in (weights.box_ap, weights.mask_ap, weights.keypoint_ap)]
        source = f"{weights.source} ({weights.licence}), {weights.file}"
        size = "" if weights.megabytes is None else f"{weights.megabytes:.0f}"
        print(f"{name:<44}{figures[0]:>8}{figures[1]:>9}{figures[2]:>11}{size:>6}  {source}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
