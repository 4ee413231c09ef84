"""Speech, noise and music for the audio recipes, from Debian packages, and mixtures of them at a known SNR.

Speech: studio recordings of four speakers, one a language. Three are trained on; the fourth is heard in the test only. The
same holds for the noises: every fifth file is kept for the test.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slimkernels.recipes.data import DataError

SAMPLE_RATE = 16_000
SPEECH_FOLDER = Path("/usr/share/asterisk/sounds")
SPEAKERS = {"en": "en_US_f_Allison", "fr": "fr_CA_f_June", "it": "it_IT_m_Carlo", "ru": "ru_RU_f_IvrvoiceRU"}
TRAIN_SPEAKERS, TEST_SPEAKERS = ("fr", "it", "ru"), ("en",)
NOISE_FOLDER = Path("/usr/share/sonic-pi/samples")
TEST_EVERY = 5  # every fifth noise file, in order of name, is kept for the test
PACKAGES = (
    "apt-get install asterisk-core-sounds-en-g722 asterisk-core-sounds-fr-g722 asterisk-core-sounds-it-g722"
    " asterisk-core-sounds-ru-g722 sonic-pi-samples"
)


def read_audio(path: Path, sample_rate: int = SAMPLE_RATE) -> Tensor:  # (samples,) float32, mono
    """A sound file in any format that PyAV reads, mixed down to mono and resampled.

    Raises: DataError when PyAV is not installed, the file is damaged, or its sample rate is lower than asked for: the upper
        part of its spectrum would be empty.
    """
    try:
        import av
    except ImportError:
        raise DataError("reading audio needs PyAV; type 'pip install av'") from None
    try:
        with av.open(str(path), format="g722" if path.suffix == ".g722" else None) as container:
            rate = container.streams.audio[0].rate
            if 0 < rate < sample_rate:  # 0: unknown, found damaged below
                raise DataError(f"audio: expected a sample rate of at least {sample_rate} Hz, got {rate} Hz in {path}")
            resampler = av.AudioResampler("flt", "mono", sample_rate)
            frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
            frames += resampler.resample(None)
    except (av.FFmpegError, IndexError) as error:
        raise DataError(f"audio: {path} is damaged or no sound file ({error})") from error
    if not frames:
        raise DataError(f"audio: {path} is damaged or no sound file (nothing could be decoded)")
    return torch.cat([torch.from_numpy(frame.to_ndarray().reshape(-1).copy()) for frame in frames])


def write_wav(path: Path, signal: Tensor, sample_rate: int = SAMPLE_RATE) -> None:
    """(samples,) between -1 and 1 to a 16-bit mono WAV file."""
    import wave

    samples = (signal.clamp(-1, 1) * 32767).round().to(torch.int16).numpy()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples.tobytes())


def read_folder(folder: Path, suffix: str) -> list[Tensor]:
    """Every file of that suffix below ``folder``, in order of name; empty files (the packages have one) are left out."""
    paths = sorted(path for path in folder.rglob(f"*{suffix}") if path.stat().st_size) if folder.is_dir() else []
    if not paths:
        raise DataError(f"audio: expected *{suffix} files in {folder}, got none; type '{PACKAGES}'")
    return [read_audio(path) for path in paths]


def trimmed(signal: Tensor, frame: int = 320, floor_db: float = -45.0) -> Tensor:
    """Without the silence at both ends: from the first to the last frame within ``floor_db`` of the loudest one."""
    count = len(signal) // frame
    if count == 0:
        return signal
    power = signal[: count * frame].view(count, frame).square().mean(1)
    loud = (power > power.max() * 10 ** (floor_db / 10)).nonzero()
    return signal[int(loud[0]) * frame : (int(loud[-1]) + 1) * frame] if len(loud) else signal


@dataclass
class Sounds:
    """Speech and noises of one part (training or test) at 16 kHz."""

    speech: Tensor  # (samples,): all prompts of its speakers one after another
    noises: list[Tensor]  # (samples,) each


def load_sounds(speech_folder: Path = SPEECH_FOLDER, noise_folder: Path = NOISE_FOLDER) -> tuple[Sounds, Sounds]:
    """The training part and the test part; no speaker and no noise is in both.

    Raises: DataError when a folder is missing or holds no sound; the message says what to install.
    """
    noises = read_folder(Path(noise_folder), ".flac")
    parts = []
    for speakers, test in ((TRAIN_SPEAKERS, False), (TEST_SPEAKERS, True)):
        prompts = [trimmed(p) for s in speakers for p in read_folder(Path(speech_folder) / SPEAKERS[s], ".g722")]
        own = [noise for i, noise in enumerate(noises) if (i % TEST_EVERY == TEST_EVERY - 1) == test]
        parts.append(Sounds(torch.cat(prompts), own))
    return parts[0], parts[1]


def looped(noise: Tensor, samples: int, start: int) -> Tensor:
    """``samples`` of a sound that is repeated end to end."""
    index = (torch.arange(samples) + start) % len(noise)
    return noise[index]


def mixture(
    sounds: Sounds, samples: int, generator: torch.Generator, snr_db: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """A random piece of speech with one or two looped noises; (samples,) noisy and clean."""

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    for _ in range(100):  # a piece that is mostly pause is drawn again
        start = draw(len(sounds.speech) - samples)
        clean = sounds.speech[start : start + samples]
        if clean.square().mean() > 1e-5:
            break
    noise = torch.zeros(samples)
    for _ in range(1 + draw(2)):
        source = sounds.noises[draw(len(sounds.noises))]
        piece = looped(source, samples, draw(len(source)))
        noise = noise + piece / piece.square().mean().sqrt().clamp_min(1e-6)
    low, high = snr_db
    snr = low + (high - low) * torch.rand((), generator=generator)
    level = -28 + 10 * torch.rand((), generator=generator)  # of the speech, dB of full scale
    clean = clean / clean.square().mean().sqrt().clamp_min(1e-6) * 10 ** (level / 20)
    noise = noise / noise.square().mean().sqrt().clamp_min(1e-6) * 10 ** ((level - snr) / 20)
    loudest = (clean + noise).abs().max().clamp_min(1.0)
    return (clean + noise) / loudest, clean / loudest


class Mixtures:
    """Batches of random mixtures, (noisy, clean) of shape (b, samples); each ``iter`` is one epoch of ``length`` batches.

    All randomness comes from ``generator``, which the trainers seed at the start of every epoch.
    """

    def __init__(
        self, sounds: Sounds, batch: int, seconds: float, length: int, snr_db: tuple[float, float] = (-5.0, 15.0)
    ):
        self.sounds, self.batch, self.length, self.snr_db = sounds, batch, length, snr_db
        self.samples = round(seconds * SAMPLE_RATE)
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.length):
            pairs = [mixture(self.sounds, self.samples, self.generator, self.snr_db) for _ in range(self.batch)]
            yield torch.stack([noisy for noisy, _ in pairs]), torch.stack([clean for _, clean in pairs])


def fixed_mixtures(
    sounds: Sounds, count: int, seconds: float, snr_db: tuple[float, float] = (0.0, 10.0), seed: int = 1
):
    """The same ``count`` mixtures at every call: (count, samples) noisy and clean."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [mixture(sounds, round(seconds * SAMPLE_RATE), generator, snr_db) for _ in range(count)]
    return torch.stack([noisy for noisy, _ in pairs]), torch.stack([clean for _, clean in pairs])
