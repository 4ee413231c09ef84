"""``python -m benchmarks.recipe_tables [--check]``: the recipes' tables in the README and TRAINED.md, from their CSV files.

``--check`` writes nothing and exits non-zero when a table is stale.
"""

import argparse
import csv
import re
import statistics
import sys

from benchmarks.report import README, between_marks
from benchmarks.run import FOLDER, RESULTS
from slimkernels.recipes.enhance_results import by_width, mean_of
from slimkernels.recipes.separate_results import WAYS, spread, summary, times

PAGES = (README, FOLDER / "TRAINED.md")
TABLES = {
    "demo": "demo-digits.csv",
    "cifar": "cifar10-resnet20.csv",
    "enhance": "nsnet2-enhance.csv",
    "separate": "bsrnn-separate.csv",
    "hyper-block": "hyper/last-block.csv",
    "hyper-digits": "hyper/digits.csv",
    "hyper-seeds": "hyper/digits-seeds.csv",
    "hyper-cifar": "hyper/cifar.csv",
}
BESIDE_UNSEEN = ("0.46875", "0.40625")  # trained where steps draw thirty-seconds
HYPER_WIDTHS = ("1", "0.8125", "0.75", "0.625", "0.5", "0.46875", "0.4375", "0.40625", "0.25")
APART = re.compile(r" --(?:arms|out) (?:'[^']*'|\S+)| --resume| --seed \d+")  # in what runs of one table differ
PROVIDERS = {"deployed": "deployed", "slimkernels": "ours", "slicing": "slicing", "plain": "plain"}


def markdown(rows: list[dict[str, str]]) -> str:
    first = rows[0]
    batches = [
        key.split("_")[1].removeprefix("batch") for key in first if key.startswith("plain_") and key.endswith("_p50_ms")
    ]
    heads = ["width", "parameters", "MACs", "accuracy before", "after"]
    heads += [f"{name}, batch {batch}" for batch in batches for name in PROVIDERS.values()]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---:|" * len(heads)]
    for row in rows:
        cells = [row["width"], f"{int(row['parameters']):,}", f"{int(row['macs']) / 1e6:.2f} M"]
        cells += [row["accuracy_before"], f"**{row['accuracy_after']}**"]
        cells += [f"{float(row[f'{provider}_batch{batch}_p50_ms']):.3g}" for batch in batches for provider in PROVIDERS]
        lines.append("| " + " | ".join(cells) + " |")
    text = (
        f"{first['network']} on {first['data']}: {int(first['train_images']):,} images to train on,"
        f" {int(first['test_images']):,} to test, {first['steps']} steps of {first['batch_size']}, one seed."
        " Latency in ms (channels-last), medians of one interleaved run on one thread"
        f" ({first['cpu']}, {first['isa']}, load average {first['load']}):"
        " our elastic model, deployed and (ours) as it is, the usual slicing code, and a plain PyTorch network built at that"
        " width, all four computing the same."
    )
    note = f" {first['note']}" if first["note"] else ""
    return "\n".join([*lines, "", f"{text}{note} `{first['command']}`"])


def speech_markdown(rows: list[dict[str, str]]) -> str:
    first, of_width = rows[0], by_width(rows)
    seeds = len(next(iter(of_width.values())))
    heads = ["width", "parameters", "MACs a second", "SI-SDR before", "after", "ours, ms a step", "PyTorch, ms a step"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---:|" * len(heads)]
    for width, of_seeds in of_width.items():
        row = of_seeds[0]
        cells = [width, f"{int(row['parameters']):,}", f"{int(row['macs_per_second']) / 1e6:.0f} M"]
        cells += [mean_of(of_seeds, "si_sdr_before"), f"**{mean_of(of_seeds, 'si_sdr_after')}**"]
        cells += [f"{float(row[f'{provider}_step_p50_ms']):.3g}" for provider in ("slimkernels", "plain")]
        lines.append("| " + " | ".join(cells) + " |")
    repeated = f"; mean and standard deviation of {seeds} seeds" if seeds > 1 else ", one seed"
    text = (
        f"{first['network']} on {first['data']}: {first['test_mixtures']} test mixtures of {float(first['test_seconds']):g} s"
        f" with an SI-SDR of {first['si_sdr_noisy']} dB before enhancement; {first['steps']} steps of {first['batch_size']} x"
        f" {float(first['batch_seconds']):g} s{repeated}. A step is one frame of 10 ms through the network; medians of one"
        f" interleaved run on one thread ({first['cpu']}, {first['isa']}, load average {first['load']}): our elastic model,"
        " and a network of torch's own layers built at that width, both computing the same."
    )
    return "\n".join([*lines, "", f"{text} `{first['command']}`"])


def hyper_markdown(rows: list[dict[str, str]]) -> str:
    """A row an arm: accuracy in percent, mean and standard deviation over seeds where there are several."""
    unseen = {row["width"] for row in rows if row["trained"] == "no" and not row["arm"].endswith("sliced")}
    widths = [w for w in HYPER_WIDTHS if w not in BESIDE_UNSEEN or any(row["width"] == w for row in rows)]
    heads = ["arm", "seeds", *(f"{w}*" if w in unseen else w for w in widths)]
    lines = ["| " + " | ".join(heads) + " |", "|---|---:|" + "---:|" * len(widths)]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of_arm = [row for row in rows if row["arm"] == arm]
        cells = []
        for width in widths:
            found = [100 * float(row["accuracy"]) for row in of_arm if row["width"] == width]
            spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 and not arm.endswith("sliced") else ""
            cells.append(f"{statistics.mean(found):.1f}{spread}" if found else "")
        seeds = str(len({row["seed"] for row in of_arm}))
        lines.append("| " + " | ".join([arm, "" if arm.endswith("sliced") else seeds, *cells]) + " |")
    last = rows[-1]
    text = (
        f"{last['network']} on {last['data']}: {int(last['train_images']):,} images to train on,"
        f" {int(last['test_images']):,} to test; {last['steps']} steps of {last['batch_size']}. Accuracy in %; * never trained;"
        ' "sliced": before any training'
    )
    if any(row["arm"] == "alone" for row in rows):
        text += '; "alone": a copy of the network trained at that width only'
    if any(row["samples"] for row in rows):
        text += '; "mean of K": weights averaged over K noisy samples'
    text += "."
    note = f" {last['note']}" if last["note"] else ""
    commands = dict.fromkeys(APART.sub("", row["command"]) for row in rows)
    return "\n".join(
        [*lines, "", f"{text}{note} `--arms` and `--seed` of each run are in the CSV.", "", "```sh", *commands, "```"]
    )


def separate_markdown(rows: list[dict[str, str]]) -> str:
    first, seeds = rows[0], len({row["seed"] for row in rows})
    heads = ["width", "depth", "parameters", "MACs a second", "taken out", "trained alone", "CPU s alone"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---:|" * len(heads)]
    better, cells_of = 0, summary(rows)
    for (width, depth), cell in cells_of.items():
        found = {way: spread(cell[way], "si_sdr") for way in WAYS}
        best = max(found, key=lambda way: found[way][0])
        better += best == WAYS[0]
        scores = ["{:.2f} ± {:.2f}".format(*found[way]) for way in WAYS]
        cells = [width, depth, f"{int(cell['alone'][0]['parameters']):,}"]
        cells += [f"{int(cell['alone'][0]['macs_per_second']) / 1e6:.0f} M"]
        cells += [f"**{text}**" if way == best else text for way, text in zip(WAYS, scores, strict=True)]
        lines.append("| " + " | ".join([*cells, f"{spread(cell['alone'], 'training_cpu_s')[0]:.0f}"]) + " |")
    text = (
        f"SI-SDR in dB, mean and standard deviation of {seeds} seeds; the mixtures have {first['si_sdr_mixture']} dB."
        f" {first['network']}, on {first['data']}: {first['test_mixtures']} test mixtures of"
        f" {float(first['test_seconds']):g} s; every training {first['steps']} steps of {first['batch_size']} x"
        f" {float(first['batch_seconds']):g} s with the same batches, optimizer and learning rate; a step of the elastic one"
        " runs the largest, the smallest and one more sub-network. Networks trained alone are plain PyTorch. Taken out of the"
        f" elastic network, {better} of the {len(cells_of)} sub-networks score higher than trained alone. {times(rows)}"
        f" ({first['cpu']}, {first['isa']}, one thread, load average {first['load']}.)"
    )
    return "\n".join([*lines, "", f"{text} `{first['command']}`"])


MARKDOWN = {"enhance": speech_markdown, "separate": separate_markdown, "hyper": hyper_markdown}


def filled(text: str) -> str:
    """A page's text with the tables of the CSV files as they are now."""
    for name, file in TABLES.items():
        if f"<!-- {name}:start -->" in text:
            with (RESULTS / file).open(newline="") as opened:
                rows = list(csv.DictReader(opened))
            text = between_marks(text, name, MARKDOWN.get(name.partition("-")[0], markdown)(rows))
    return text


def stale() -> list[str]:
    return [page.name for page in PAGES if filled(page.read_text()) != page.read_text()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    names = stale()
    if parser.parse_args().check:
        if names:
            sys.exit(f"stale: {', '.join(names)}; type 'python -m benchmarks.recipe_tables'")
        return
    for page in PAGES:
        page.write_text(filled(page.read_text()))
    print(f"written: {', '.join(names) or 'nothing new'}")


if __name__ == "__main__":
    main()
