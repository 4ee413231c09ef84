"""``python -m benchmarks.merge_hyper NAME RUN...``: tables of several runs of ``slimkernels train hyper`` (seeds, or arms run
apart) as ``results/hyper/NAME.csv``, with their plot. Without a run the plot is drawn again.
"""

import argparse
import csv
from pathlib import Path

from slimkernels.recipes import results
from slimkernels.recipes.hyper_results import plot

FOLDER = Path(__file__).parent / "results" / "hyper"


def merged(tables: list[list[results.Row]]) -> list[results.Row]:
    """All rows arm by arm, the untrained network's once.

    Raises: ValueError when an arm was measured twice with one seed, or the runs are of different networks, data or steps.
    """
    found: dict[tuple[str, str, str], results.Row] = {}
    for rows in tables:
        for row in rows:
            untrained = row["arm"].endswith("sliced")
            key = (row["arm"], "" if untrained else str(row["seed"]), row["width"])
            if key in found and not untrained:
                raise ValueError(
                    f"merge_hyper: expected each arm once a seed, got {row['arm']!r} twice, seed {row['seed']}"
                )
            found.setdefault(key, row)
    rows = list(found.values())
    for column in ("network", "data", "steps", "batch_size"):
        values = {row[column] for row in rows if not row["arm"].endswith("sliced")}
        if len(values) > 1:
            raise ValueError(f"merge_hyper: expected runs of one {column}, got {', '.join(sorted(values))}")
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    return sorted(rows, key=lambda row: arms.index(row["arm"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("runs", nargs="*", type=Path)
    arguments = parser.parse_args()
    table = FOLDER / f"{arguments.name}.csv"
    tables = []
    for path in [run / "table.csv" for run in arguments.runs] or [table]:
        with path.open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    rows = merged(tables)
    results.write_csv(rows, table)
    last = rows[-1]
    title = f"{last['network']} on {last['data']}, {last['steps']} steps an arm"
    plot([row for row in rows if not row["samples"]], FOLDER / f"{arguments.name}.svg", title)


if __name__ == "__main__":
    main()
