r"""Small figures of the cards and the log that no other benchmark has.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/card_figures.py            # minutes, one core
    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/card_figures.py vrgd egn   # of some cards

Each takes seconds to a minute, on a CPU and one thread; all but those in milliseconds, and ratios
of them, are the same in each run under one version of torch. Rows go to
`benchmarks/results/card_figures.csv`: `thing` is the card, or the section of the log.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch

from benchmarks import _card_formats, _card_landscapes, _card_noise, _card_times, _card_training
from benchmarks._rows import KEY, ROOT, describe, name_of, write

RESULTS = ROOT / "benchmarks" / "results" / "card_figures.csv"
Figures = Iterator[tuple[str, str, float]]  # what, under which setting, value
CARDS: dict[str, Callable[[], Figures]] = {
    **_card_formats.CARDS,
    **_card_noise.CARDS,
    **_card_training.CARDS,
    **_card_landscapes.CARDS,
    **_card_times.CARDS,
}


def rows_of(card: str) -> list[dict[str, str]]:
    """The rows of one card."""
    torch.manual_seed(0)
    rows, where = [], name_of("cpu", torch.get_num_threads())
    for what, setting, value in CARDS[card]():
        key = (card, what, setting, "", "", where)
        figure = {"value": f"{value:.6g}"}
        rows.append(dict(zip(KEY, key, strict=True)) | figure | describe("torch", "numpy"))
        print(card, "|", what, "|", setting, "|", figure["value"], flush=True)
    return rows


def main() -> None:
    """Make the rows of the cards that are asked for."""
    parser = argparse.ArgumentParser(description="Small figures of the cards.")
    parser.add_argument("cards", nargs="*", help=f"of {', '.join(CARDS)}; all by default")
    args = parser.parse_args()
    if unknown := set(args.cards) - set(CARDS):
        parser.error(f"no figures of {', '.join(sorted(unknown))}; there are {', '.join(CARDS)}")
    torch.set_num_threads(1)
    for card in args.cards or CARDS:
        write(rows_of(card), RESULTS)


if __name__ == "__main__":
    main()
