"""Speech apart from music at any width and depth: sub-networks of one training against each of them trained alone."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from slimkernels import elastic, train
from slimkernels.models.bsrnn import BSRNN, pack, unpack
from slimkernels.recipes import separate_results
from slimkernels.recipes.audio_scores import require_torchmetrics, si_sdr_db, snr
from slimkernels.recipes.clock import Clocked
from slimkernels.recipes.enhance import EPOCH
from slimkernels.recipes.pipeline import Stopped, cosine_schedule, folder_for, writing
from slimkernels.recipes.speech_data import (
    NOISE_FOLDER,
    SAMPLE_RATE,
    SPEECH_FOLDER,
    Mixtures,
    Sounds,
    fixed_mixtures,
    load_sounds,
    write_wav,
)

WIDTHS, DEPTHS = (1.0, 0.5, 0.25), (1.0, 0.5)
WINDOW, HOP = 512, 256
BANDS = [8] * 8 + [16] * 4 + [32] * 3 + [33]  # 257 bins of 31 Hz: 250 Hz a band up to 2 kHz, then wider
LEVELS = (-5.0, 5.0)  # dB of the speech over the music
WIDTHS_A_STEP = 3
Subnet = tuple[float, float]  # width, depth
Targets = tuple[Tensor, Tensor]  # spectrum of the mixture, speech


@dataclass
class Settings:
    """What a person may set."""

    steps: int = 800
    batch_size: int = 8
    seconds: float = 1.0  # of each training mixture
    lr: float = 2e-3
    features: int = 32
    hidden: int = 64
    layers: int = 4
    seeds: int = 3
    test_mixtures: int = 64
    test_seconds: float = 3.0

    @property
    def subnets(self) -> list[Subnet]:
        return [(w, d) for d in DEPTHS for w in WIDTHS]


def prepared(mixed: Tensor, speech: Tensor) -> tuple[Tensor, Targets]:  # (b, samples) each
    """A batch as the trainer takes it: the packed spectrum, and what the loss needs."""
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(mixed, WINDOW, HOP, window=window, return_complex=True).unsqueeze(1)
    return pack(spectrum), (spectrum, speech)


def estimate(mask: Tensor, targets: Targets) -> Tensor:  # (b, frames, packed bins) -> (b, samples)
    spectrum, speech = targets
    window = torch.hann_window(WINDOW)
    return torch.istft((spectrum * unpack(mask, 1)).squeeze(1), WINDOW, HOP, window=window, length=speech.shape[-1])


def loss_fn(mask: Tensor, targets: Targets) -> Tensor:
    """Negative signal-to-noise ratio: unlike SI-SDR it does not leave the level open."""
    return -snr(estimate(mask, targets), targets[1]).mean()


def measured(mask: Tensor, targets: Targets) -> Tensor:
    return si_sdr_db(estimate(mask, targets), targets[1])


class SpectrumBatches:
    """Mixtures as (packed spectrum, targets)."""

    def __init__(self, sounds: Sounds, settings: Settings):
        self.mixtures = Mixtures(sounds, settings.batch_size, settings.seconds, EPOCH, LEVELS)
        self.generator = self.mixtures.generator  # the trainer seeds it

    def __len__(self) -> int:
        return len(self.mixtures)

    def __iter__(self) -> Iterator[tuple[Tensor, Targets]]:
        for mixed, speech in self.mixtures:
            yield prepared(mixed, speech)


def music(sounds: Sounds) -> Sounds:
    """Without single strokes: loops and phrases of a second at least."""
    return Sounds(sounds.speech, [noise for noise in sounds.noises if len(noise) >= SAMPLE_RATE])


class ElasticTrainer(Clocked, train.SlimmableTrainer):
    pass


class AloneTrainer(Clocked):
    """Trains a network of one size."""

    def training_step(self, batches: list[Any]) -> dict[Any, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        inputs, targets = batches[0]
        loss = loss_fn(self.model(inputs), targets)
        loss.backward()
        self.finish_step()
        return {"loss": loss.detach()}


def make_trainer(
    model: nn.Module, sounds: Sounds, settings: Settings, seed: int, checkpoints: Path, progress: bool
) -> ElasticTrainer | AloneTrainer:
    """The same batches, optimizer, schedule and number of steps for an elastic model and for one of a single size."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=1e-4)
    common: dict[str, Any] = {
        "train_loader": SpectrumBatches(sounds, settings),
        "scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_schedule(settings.steps, 0.05)),
        "clip_grad": 5.0,
        "checkpoint_dir": checkpoints,
        "checkpoint_every": min(EPOCH, settings.steps),
        "keep": 2,
        "seed": seed,
        "progress": progress,
    }
    if not hasattr(model, "_elastic"):
        return AloneTrainer(model, optimizer, **common)
    sampler = train.WidthSampler(list(WIDTHS), "sandwich", WIDTHS_A_STEP, depths=DEPTHS, seed=seed)
    return ElasticTrainer(model, loss_fn, optimizer, rule=sampler, distill=None, **common)


def elastic_network(settings: Settings, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = BSRNN(settings.features, settings.hidden, settings.layers, BANDS, channels=1)
    example = torch.zeros(1, SAMPLE_RATE // HOP + 1, 2 * sum(BANDS))  # one second: what the MACs are counted for
    return elastic.convert(network, example, widths=sorted(WIDTHS), depth=True)


def alone_network(elastic_model: nn.Module, subnet: Subnet, seed: int) -> nn.Module:
    """A network of torch's own layers with the sizes of a sub-network and fresh weights."""
    made = elastic.extract(elastic_model, *subnet)
    torch.manual_seed(seed)
    for module in made.modules():
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    return made


def run(
    out: str | Path,
    settings: Settings | None = None,
    *,
    speech: Path = SPEECH_FOLDER,
    noise: Path = NOISE_FOLDER,
    resume: bool = False,
    command: str = "",
    console: Console | None = None,
) -> list[separate_results.Row]:
    """Trains, for every seed, one elastic network and each of its sub-networks alone, all with the same number of steps;
    writes ``table.csv``, ``plot.png``, ``elastic.safetensors`` of the first seed, and a test mixture with the speech that the
    full network and the smallest sub-network find in it as WAV files into ``out``.

    Returns: a row per seed, way of training, width and depth.
    Raises: Stopped when Ctrl-C ended the training; DataError, CheckpointError, TrainingError with one sentence each.
    """
    settings = Settings() if settings is None else settings
    console = Console() if console is None else console
    require_torchmetrics()
    with console.status("reading speech and music"):
        training, testing = (music(part) for part in load_sounds(speech, noise))
    written = ("elastic.safetensors", "table.csv", "plot.png", "*.wav")
    out = folder_for(Path(out), resume, written)
    mixed, clean = fixed_mixtures(testing, settings.test_mixtures, settings.test_seconds, LEVELS)
    test = [prepared(*pair) for pair in zip(mixed.split(16), clean.split(16), strict=True)]
    unprocessed = si_sdr_db(mixed, clean).mean().item()
    console.print(f"mixtures: {unprocessed:.2f} dB", highlight=False)

    results: list[separate_results.Result] = []
    for seed in range(settings.seeds):
        model = elastic_network(settings, seed)
        if seed == 0:
            console.print(elastic.report(model))
            costs = {subnet: elastic.cost(model, *subnet) for subnet in settings.subnets}
        for subnet in (None, *settings.subnets):
            network = model if subnet is None else alone_network(model, subnet, seed)
            folder = out / "checkpoints" / f"seed-{seed}" / _name(subnet)
            scores, seconds = trained(network, training, test, settings, seed, folder, resume, console)
            how = "taken out" if subnet is None else "alone"
            for key, score in scores.items():
                found = key if subnet is None else subnet
                results.append(separate_results.Result(seed, how, *found, score, seconds))
            line = "  ".join(f"{s:.2f}" for s in scores.values())
            console.print(f"seed {seed}, {_name(subnet)}: {line} dB, {seconds:.0f} CPU seconds", highlight=False)
        if seed == 0:
            _keep(model, mixed, test, settings, out)
    rows = separate_results.rows(results, costs, unprocessed, settings, command)
    with writing(out / "table.csv") as aside:
        separate_results.write_csv(rows, aside)
    with writing(out / "plot.png") as aside:
        separate_results.plot(rows, aside)
    console.print(separate_results.table(rows))
    console.print(separate_results.times(rows), highlight=False)
    console.print(f"written to {out}", highlight=False)
    return rows


def trained(
    network: nn.Module,
    training: Sounds,
    test: Sequence[tuple[Tensor, Targets]],
    settings: Settings,
    seed: int,
    folder: Path,
    resume: bool,
    console: Console,
) -> tuple[dict[Subnet, float], float]:
    """SI-SDR of every sub-network (of a network of one size: of itself) and CPU seconds of the training; both are kept in
    ``folder``, so that a resumed run does not train again what is done. The network ends with the trained weights."""
    done = folder / "result.json"
    trainer = make_trainer(network, training, settings, seed, folder, not console.quiet)
    trainer.fit(steps=settings.steps, resume=resume)
    if trainer.stopped:
        raise Stopped(
            f"stopped at step {trainer.step} of {settings.steps} of {folder.parent.name}, {folder.name};"
            " the same command with --resume goes on from there"
        )
    if resume and done.exists():
        kept = json.loads(done.read_text())
        if kept["steps"] == settings.steps:
            return {(w, d): score for w, d, score in kept["scores"]}, kept["cpu_seconds"]
    seconds = trainer.cpu_seconds
    subnets: Sequence[Any] = settings.subnets if isinstance(trainer, ElasticTrainer) else [None]
    found = train.evaluate(network, test, subnets, {"si_sdr": measured})
    scores: Mapping[Any, float] = {subnet or (1.0, 1.0): row["si_sdr"] for subnet, row in found.items()}
    with writing(done) as aside:
        kept = {"steps": settings.steps, "cpu_seconds": seconds, "scores": [[*key, s] for key, s in scores.items()]}
        aside.write_text(json.dumps(kept))
    return dict(scores), seconds


def _keep(
    model: nn.Module, mixed: Tensor, test: Sequence[tuple[Tensor, Targets]], settings: Settings, out: Path
) -> None:
    with writing(out / "elastic.safetensors") as aside:
        elastic.save(model, aside)
    with writing(out / "mixture.wav") as aside:
        write_wav(aside, mixed[0])
    x, targets = test[0]
    for subnet in (settings.subnets[0], settings.subnets[-1]):
        with elastic.width(model, *subnet), torch.no_grad():
            speech = estimate(model(x), targets)[0]
        with writing(out / f"speech-{_name(subnet)}.wav") as aside:
            write_wav(aside, speech)


def _name(subnet: Subnet | None) -> str:
    return "elastic" if subnet is None else f"{subnet[0]:g}x{subnet[1]:g}"
