"""A speech enhancer that somebody else trained becomes slimmable, on real speech; tested on a speaker it never heard."""

import copy
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from slimkernels import elastic, train
from slimkernels.models.nsnet2 import NSNet2, State, log_power
from slimkernels.recipes import enhance_results, latency
from slimkernels.recipes.audio_scores import require_torchmetrics, si_sdr, si_sdr_db
from slimkernels.recipes.clock import Clocked
from slimkernels.recipes.data import load_into
from slimkernels.recipes.nsnet2_weights import nsnet2
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

WIDTHS = (1.0, 0.75, 0.5, 0.25)
WINDOW, HOP = 320, 160
EPOCH = 50  # batches; a run that is resumed mixes those of its epoch again
Targets = tuple[Tensor, Tensor, Tensor, Tensor]  # noisy spectrum, clean signal, clean magnitudes, the frozen net's gain


@dataclass
class Settings:
    """What a person may set."""

    steps: int = 500
    batch_size: int = 8
    seconds: float = 2.0  # of each training mixture
    lr: float = 1e-3
    distill: float = 1.0  # weight of the distance to the gain of the network as published
    test_mixtures: int = 64
    test_seconds: float = 4.0
    seeds: int = 1  # so many repetitions with seeds 0, 1, ...


def spectrum_of(signal: Tensor) -> Tensor:  # (b, samples) -> complex (b, frames, bins)
    window = torch.hann_window(WINDOW, device=signal.device).sqrt()
    return torch.stft(signal, WINDOW, HOP, window=window, return_complex=True).transpose(1, 2)


def signal_of(spectrum: Tensor, samples: int) -> Tensor:  # the inverse
    window = torch.hann_window(WINDOW, device=spectrum.device).sqrt()
    return torch.istft(spectrum.transpose(1, 2), WINDOW, HOP, window=window, length=samples)


def prepared(noisy: Tensor, clean: Tensor, teacher: nn.Module | None) -> tuple[Tensor, Targets]:
    """A batch as the trainer takes it: features, and what the loss needs."""
    spectrum = spectrum_of(noisy)
    features = log_power(spectrum)
    with torch.no_grad():
        gain = torch.zeros_like(features) if teacher is None else teacher(features)
    return features, (spectrum, clean, spectrum_of(clean).abs(), gain)


def loss_fn(gain: Tensor, targets: Targets, distill: float = 1.0) -> Tensor:
    """Negative SI-SDR, the distance of compressed magnitudes (SI-SDR alone leaves the level open), and distillation."""
    spectrum, clean, magnitude, teacher = targets
    enhanced = signal_of(spectrum * gain, clean.shape[-1])
    compressed = (gain * spectrum.abs() + 1e-3) ** 0.3 - (magnitude + 1e-3) ** 0.3
    loss = -si_sdr(enhanced, clean).mean() + 20 * compressed.square().mean()
    return loss + distill * 10 * (gain - teacher).square().mean()


class SpectrumBatches:
    """Mixtures as (features, targets)."""

    def __init__(self, sounds: Sounds, batch: int, seconds: float, length: int, teacher: nn.Module):
        self.mixtures, self.teacher = Mixtures(sounds, batch, seconds, length), teacher
        self.generator = self.mixtures.generator  # the trainer seeds it

    def __len__(self) -> int:
        return len(self.mixtures)

    def __iter__(self) -> Iterator[tuple[Tensor, Targets]]:
        for noisy, clean in self.mixtures:
            yield prepared(noisy, clean, self.teacher)


def measured(gain: Tensor, targets: Targets) -> Tensor:
    """SI-SDR in dB, per mixture."""
    return si_sdr_db(signal_of(targets[0] * gain, targets[1].shape[-1]), targets[1])


def scores(model: nn.Module, test: Sequence[tuple[Tensor, Targets]], widths: Sequence[float]) -> dict[float, float]:
    found = train.evaluate(model, test, list(widths), {"si_sdr": measured})
    return {w: found[w]["si_sdr"] for w in widths}


class Streaming(nn.Module):
    """One call is one frame of an endless signal: the state is kept between calls."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network: Any = network  # an NSNet2
        self.state: State | None = None

    def forward(self, frame: Tensor) -> Tensor:  # (1, 1, bins) -> the same
        gain, self.state = self.network.stream(frame, self.state)
        return gain


def plain(extracted: nn.Module) -> NSNet2:
    """A network of torch's own layers built at the widths of a sub-network, with its weights.

    One width stands for the layers from the input to the last GRU, one for those after it.
    """
    assert isinstance(extracted, NSNet2)
    first = extracted.fc_out[0]
    assert isinstance(first, nn.Linear)
    made = NSNet2(extracted.rnn1.hidden_size, first.out_features)
    load_into(made, extracted.state_dict(), "the sub-network")
    return made.eval()


def timed(model: nn.Module, features: Tensor, widths: Sequence[float], budget: float):
    """Milliseconds of a streaming step, ours and torch's own layers at that width in turns, first checked to be equal."""
    networks: dict[float, dict[str, nn.Module]] = {}
    for w in widths:
        found = {"slimkernels": elastic.view(model, w).eval(), "plain": plain(elastic.extract(model, w))}
        latency.check_same(found, features)
        networks[w] = {name: Streaming(network) for name, network in found.items()}
    return latency.interleaved(networks, {1: features[:1, :1].contiguous()}, budget)


def run(
    out: str | Path,
    settings: Settings | None = None,
    *,
    speech: Path = SPEECH_FOLDER,
    noise: Path = NOISE_FOLDER,
    resume: bool = False,
    command: str = "",
    console: Console | None = None,
    network: NSNet2 | None = None,
    widths: Sequence[float] = WIDTHS,
    latency_seconds: float = 4.0,
) -> list[enhance_results.Row]:
    """Runs the recipe and writes ``elastic.safetensors``, ``table.csv``, ``plot.png`` and two enhanced WAV files into ``out``.

    Args:
        network: to start from; None: NSNet2 as published, from its package.

    Returns: one row per width.
    Raises: Stopped when Ctrl-C ended the training; DataError, CheckpointError, TrainingError with one sentence each.
    """
    settings = Settings() if settings is None else settings
    console = Console() if console is None else console
    require_torchmetrics()
    teacher = copy.deepcopy(nsnet2() if network is None else network).eval().requires_grad_(False)
    with console.status("reading speech and noises"):
        training, testing = load_sounds(speech, noise)
    out = folder_for(Path(out), resume, ("elastic.safetensors", "table.csv", "plot.png", "enhanced-*.wav"))
    noisy, clean = fixed_mixtures(testing, settings.test_mixtures, settings.test_seconds)
    test = [prepared(*pair, None) for pair in zip(noisy.split(16), clean.split(16), strict=True)]
    unprocessed = torch.cat([measured(torch.ones_like(x), targets) for x, targets in test]).mean().item()
    console.print(f"noisy: {unprocessed:.2f} dB", highlight=False)

    results = []
    for seed in range(settings.seeds):
        torch.manual_seed(seed)
        model = elastic_network(teacher, training, settings, widths, seed)
        if seed == 0:
            first = model
            console.print(elastic.report(model))
        folder = out / "checkpoints" / f"seed-{seed}"
        results.append(trained(model, teacher, training, test, settings, widths, seed, folder, resume, console))
    with console.status("latency of a streaming step: slimkernels and torch at that width in turns, one thread"):
        timings = timed(first, test[0][0], widths, latency_seconds)

    rows = enhance_results.rows(first, widths, unprocessed, results, timings, settings, command)
    with writing(out / "elastic.safetensors") as aside:
        elastic.save(first, aside)
    with writing(out / "table.csv") as aside:
        enhance_results.write_csv(rows, aside)
    with writing(out / "plot.png") as aside:
        enhance_results.plot(rows, aside)
    for w in (max(widths), min(widths)):
        with elastic.width(first, w), torch.no_grad():
            x, targets = test[0]
            enhanced = signal_of(targets[0] * first(x), noisy.shape[-1])[0]
        with writing(out / f"enhanced-{w:g}.wav") as aside:
            write_wav(aside, enhanced)
    console.print(enhance_results.table(rows))
    console.print(f"written to {out}", highlight=False)
    return rows


def elastic_network(
    teacher: nn.Module, training: Sounds, settings: Settings, widths: Sequence[float], seed: int
) -> nn.Module:
    batches = SpectrumBatches(training, settings.batch_size, settings.seconds, 4, teacher)
    batches.generator.manual_seed(seed)
    return elastic.convert(
        copy.deepcopy(teacher).requires_grad_(True),
        torch.zeros(1, SAMPLE_RATE // HOP, 1 + WINDOW // 2),  # one second: what the MACs are counted for
        widths=(min(widths), 1.0),
        sort="taylor",
        batches=batches,
        loss_fn=functools.partial(loss_fn, distill=settings.distill),
    )


def trained(
    model: nn.Module,
    teacher: nn.Module,
    training: Sounds,
    test: Sequence[tuple[Tensor, Targets]],
    settings: Settings,
    widths: Sequence[float],
    seed: int,
    folder: Path,
    resume: bool,
    console: Console,
) -> enhance_results.Result:
    """SI-SDR of every width before and after one training; both are kept in ``folder``, so that a resumed run does not
    measure again what is done. The network ends with the trained weights."""
    done = folder / "result.json"
    kept: dict[str, Any] = json.loads(done.read_text()) if resume and done.exists() else {"steps": None}
    if kept["steps"] == settings.steps:
        before = {float(w): score for w, score in kept["before"].items()}
    else:
        with console.status("SI-SDR of the sliced network, before training"):
            before = scores(model, test, widths)
        console.print(f"seed {seed}, before training: {_line(before)}", highlight=False)
    trainer = make_trainer(model, training, teacher, settings, seed, folder, console)
    trainer.fit(steps=settings.steps, resume=resume)
    if trainer.stopped:
        raise Stopped(
            f"stopped at step {trainer.step} of {settings.steps} of seed {seed};"
            " the same command with --resume goes on from there"
        )
    if kept["steps"] == settings.steps:
        after = {float(w): score for w, score in kept["after"].items()}
        return enhance_results.Result(seed, before, after, kept["cpu_seconds"])
    seconds = trainer.cpu_seconds
    with console.status("SI-SDR after training"):
        after = scores(model, test, widths)
    console.print(f"seed {seed}, after {settings.steps} steps: {_line(after)}", highlight=False)
    with writing(done) as aside:
        aside.write_text(
            json.dumps({"steps": settings.steps, "before": before, "after": after, "cpu_seconds": seconds})
        )
    return enhance_results.Result(seed, before, after, seconds)


class ElasticTrainer(Clocked, train.SlimmableTrainer):
    pass


def make_trainer(
    model: nn.Module,
    sounds: Sounds,
    teacher: nn.Module,
    settings: Settings,
    seed: int,
    checkpoints: Path,
    console: Console,
) -> ElasticTrainer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=1e-4)
    return ElasticTrainer(
        model,
        functools.partial(loss_fn, distill=settings.distill),
        optimizer,
        train_loader=SpectrumBatches(sounds, settings.batch_size, settings.seconds, EPOCH, teacher),
        widths=3,
        distill=None,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_schedule(settings.steps, 0.05)),
        clip_grad=5.0,
        checkpoint_dir=checkpoints,
        checkpoint_every=min(EPOCH, settings.steps),
        keep=2,
        seed=seed,
        progress=not console.quiet,
    )


def _line(values: dict[float, float]) -> str:
    return "  ".join(f"{w:g}: {value:.2f}" for w, value in values.items())
