"""Sounds that the test writes itself: reading, splitting into parts, mixing at a known level."""

import math

import pytest
import torch

from slimkernels.recipes.data import DataError
from slimkernels.recipes.speech_data import (
    SAMPLE_RATE,
    SPEAKERS,
    Mixtures,
    Sounds,
    fixed_mixtures,
    load_sounds,
    mixture,
    read_audio,
    read_folder,
    trimmed,
    write_wav,
)


def tone(hertz, seconds, rate=SAMPLE_RATE):
    return 0.5 * torch.sin(2 * math.pi * hertz / rate * torch.arange(round(seconds * rate)))


@pytest.fixture
def sounds():
    torch.manual_seed(0)
    return Sounds(torch.randn(64_000) * 0.1, [torch.randn(700), torch.randn(5000)])


def test_wav_round_trip_and_resampling(tmp_path):
    write_wav(tmp_path / "a.wav", tone(440, 0.5))
    assert (read_audio(tmp_path / "a.wav") - tone(440, 0.5)).abs().max() < 1e-4
    write_wav(tmp_path / "b.wav", tone(440, 0.5, 44_100), 44_100)
    resampled = read_audio(tmp_path / "b.wav")
    assert abs(len(resampled) - 8000) < 40
    middle = slice(1000, 7000)
    assert (resampled[middle] - tone(440, 0.5)[: len(resampled)][middle]).abs().max() < 0.02


def test_a_damaged_file_and_a_missing_folder_are_named(tmp_path):
    (tmp_path / "noise.flac").write_bytes(b"no sound at all")
    with pytest.raises(DataError, match=r"noise\.flac is damaged or no sound file"):
        read_audio(tmp_path / "noise.flac")
    with pytest.raises(DataError, match=r"expected \*\.g722 files in .*missing, got none; type 'apt-get install"):
        read_folder(tmp_path / "missing", ".g722")
    with pytest.raises(DataError, match="apt-get install"):
        load_sounds(tmp_path, tmp_path / "missing")


def test_a_sample_rate_that_is_too_low_is_named(tmp_path):
    write_wav(tmp_path / "telephone.wav", tone(440, 0.5, 8000), 8000)
    with pytest.raises(
        DataError, match=r"expected a sample rate of at least 16000 Hz, got 8000 Hz in .*telephone\.wav"
    ):
        read_audio(tmp_path / "telephone.wav")


def test_trimmed_cuts_silence_at_both_ends_only():
    signal = torch.cat([torch.zeros(3200), tone(300, 0.2), torch.zeros(320), tone(300, 0.1), torch.zeros(6400)])
    assert len(trimmed(signal)) == 3200 + 320 + 1600


def test_no_speaker_and_no_noise_is_in_both_parts(tmp_path, monkeypatch):
    from slimkernels.recipes import speech_data

    monkeypatch.setattr(speech_data, "read_folder", lambda folder, suffix: numbered(folder, suffix))

    def numbered(folder, suffix):
        base = 1000 * sorted(SPEAKERS.values()).index(folder.name) if suffix == ".g722" else 9000
        return [torch.full((400,), float(base + i + 1)) for i in range(11)]

    train, test = load_sounds(tmp_path, tmp_path)
    assert not set(train.speech.tolist()) & set(test.speech.tolist())
    assert (len(train.noises), len(test.noises)) == (9, 2)
    assert not {n[0].item() for n in train.noises} & {n[0].item() for n in test.noises}


def test_mixture_has_the_snr_asked_for(sounds):
    noisy, clean = mixture(sounds, 16_000, torch.Generator().manual_seed(3), (7.0, 7.0))
    snr = 10 * torch.log10(clean.square().sum() / (noisy - clean).square().sum())
    assert snr.item() == pytest.approx(7.0, abs=0.01)
    assert noisy.abs().max() <= 1


def test_mixtures_depend_on_the_generator_only(sounds):
    batches = Mixtures(sounds, batch=3, seconds=0.25, length=2)
    assert len(batches) == 2
    first = list(batches)
    assert first[0][0].shape == (3, 4000)
    batches.generator.manual_seed(0)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for x, y in zip(first, batches, strict=True) for a, b in zip(x, y, strict=True))
    assert not torch.equal(first[0][0], first[1][0])
    again = [fixed_mixtures(sounds, 4, 0.25) for _ in range(2)]
    assert torch.equal(again[0][0], again[1][0])
