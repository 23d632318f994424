"""UCI's tables: small files of the published formats against the steps written out again."""

from collections import Counter

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from pytorch_lightning import LightningDataModule

from datasets import uci

SETS = [uci.Power, uci.Gas, uci.Hepmass, uci.MiniBoone, uci.BSDS300]
each_set = pytest.mark.parametrize("kind", SETS)


def small(kind, *rows):
    """The module of a small file, which has other numbers of rows."""
    return type(kind.__name__, (kind,), {"rows": rows})


def ready(kind, root, rows):
    module = small(kind, *rows)(str(root))
    module.setup("fit")
    return [module.splits[name][0] for name in ("train", "val", "test")]


def check(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32 and len(ours)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def tenths(rows):
    """Lists of row numbers: the last tenth tests, the last tenth of the others validates."""
    test = rows[len(rows) - len(rows) // 10 :]
    others = rows[: len(rows) - len(rows) // 10]
    val = others[len(others) - len(others) // 10 :]
    return others[: len(others) - len(others) // 10], val, test


def by_mean_and_sd(columns, of, ddof=0):
    return (columns - np.mean(of, axis=0)) / np.std(of, axis=0, ddof=ddof)


# Preparation


def power_file(root, rows=205):
    generator = np.random.default_rng(0)
    data = generator.normal(size=(rows, 8)) * np.arange(1, 9) + 240
    (root / "power").mkdir()
    np.save(root / "power" / "data.npy", data)
    return data


def test_power(tmp_path):
    data = power_file(tmp_path)
    random = np.random.RandomState(42)
    random.shuffle(data)
    data = np.delete(np.delete(data, 3, axis=1), 1, axis=1)
    # Drawn in this order: voltage, power, the three meters; time stays as it is.
    data[:, 1:2] += 0.01 * random.rand(205, 1)
    data[:, 0:1] += 0.001 * random.rand(205, 1)
    data[:, 2:5] += random.rand(205, 3)
    train, val, test = (data[part] for part in tenths(list(range(205))))
    both = np.concatenate([train, val])
    expected = [by_mean_and_sd(part, both) for part in (train, val, test)]
    check(ready(uci.Power, tmp_path, (167, 18, 20)), expected)


def gas_columns(rows=200):
    """Sixteen sensors, some of which repeat others."""
    generator = np.random.default_rng(1)
    own = generator.normal(size=(rows, 16)) * 5 + 30
    noise = generator.normal(size=(rows, 16))
    for column, like in ((3, 0), (4, 0), (9, 8), (10, 9), (15, 2)):
        own[:, column] = 2 * own[:, like] + 0.1 * noise[:, column]
    own[:, 12] = -own[:, 11]  # correlation -1 is no repetition
    return own


def gas_file(root, suffix, sensors):
    (root / "gas").mkdir()
    path = root / "gas" / f"ethylene_CO{suffix}"
    if suffix == ".npy":
        np.save(path, sensors)
        return
    names = ["Time", "Meth", "Eth", *map(str, range(1, 17))]
    table = np.concatenate([np.arange(3 * len(sensors)).reshape(-1, 3), sensors], axis=1)
    if suffix == ".csv":
        lines = [",".join(names), *(",".join(map(repr, row)) for row in table.tolist())]
        path.write_text("\n".join(lines))
        return
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {name: table[:, i] for i, name in enumerate(names)}
    parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize("suffix", [".csv", ".npy", ".parquet"])
def test_gas(tmp_path, suffix):
    sensors = gas_columns()
    gas_file(tmp_path, suffix, sensors)
    columns = {i: sensors[:, i] for i in range(16)}

    def repeats(i):
        return any(np.corrcoef(columns[i], columns[j])[0, 1] > 0.98 for j in columns if j != i)

    while repeated := [i for i in columns if repeats(i)]:
        del columns[repeated[0]]
    assert list(columns) == [1, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15]
    data = np.stack(list(columns.values()), axis=1)
    data = by_mean_and_sd(data, data, ddof=1)
    module = type("Gas", (uci.Gas,), {"rows": (162, 18, 20), "shape": (11,)})(str(tmp_path))
    module.setup()
    found = [module.splits[name][0] for name in ("train", "val", "test")]
    check(found, [data[part] for part in tenths(list(range(200)))])


def hepmass_files(root):
    """Labels 0 and 1 mixed; features 2 and 5 have few values, feature 7 repeats its largest."""
    (root / "hepmass").mkdir()
    generator = np.random.default_rng(2)
    parts = []
    for name, rows in (("1000_train.csv", 120), ("1000_test.csv", 40)):
        features = generator.normal(size=(rows, 27)) * 3 + 1
        features[:, 2] = generator.integers(3, size=rows)
        features[:, 5] = np.maximum(features[:, 5], 0.5)
        features[:, 7] = np.minimum(features[:, 7], 0.5)
        labels = np.arange(rows) % 2
        header = ["# label", *(f"f{i}" for i in range(27))]
        lines = [",".join(header)]
        for label, row in zip(labels, features.tolist(), strict=True):
            cells = [f"{label}.000000000000000000e+00", *map(repr, row)]
            # The test file has one column too many.
            lines.append(",".join(cells + (["1000.0"] if "test" in name else [])))
        (root / "hepmass" / name).write_text("\n".join(lines) + "\n")
        parts.append(features[labels == 1])
    return parts


def test_hepmass(tmp_path):
    train, test = hepmass_files(tmp_path)
    kept = []
    for feature in range(27):
        counts = Counter(train[:, feature])
        if counts[min(counts)] <= 5:
            kept.append(feature)
    assert sorted(set(range(27)) - set(kept)) == [2, 5]
    train, test = (by_mean_and_sd(part, train, ddof=1)[:, kept] for part in (train, test))
    module = type("Hepmass", (uci.Hepmass,), {"rows": (54, 6, 20), "shape": (25,)})(str(tmp_path))
    module.setup()
    check([module.splits[n][0] for n in ("train", "val", "test")], [train[:54], train[54:], test])


def test_miniboone(tmp_path):
    data = np.random.default_rng(3).normal(size=(99, 43)) * np.arange(1, 44) - 5
    (tmp_path / "miniboone").mkdir()
    np.save(tmp_path / "miniboone" / "data.npy", data)
    train, val, test = (data[part] for part in tenths(list(range(99))))
    both = np.concatenate([train, val])
    expected = [by_mean_and_sd(part, both) for part in (train, val, test)]
    check(ready(uci.MiniBoone, tmp_path, (81, 9, 9)), expected)


def bsds_file(root, **parts):
    h5py = pytest.importorskip("h5py")
    (root / "BSDS300").mkdir(exist_ok=True)
    with h5py.File(root / "BSDS300" / "BSDS300.hdf5", "w") as file:
        for name, part in parts.items():
            file[name] = part


def test_bsds300_is_taken_as_it_is(tmp_path):
    generator = np.random.default_rng(4)
    parts = [generator.normal(size=(rows, 63)).astype("f4") for rows in (10, 4, 5)]
    bsds_file(tmp_path, train=parts[0], validation=parts[1], test=parts[2])
    check(ready(uci.BSDS300, tmp_path, (10, 4, 5)), parts)


@pytest.mark.parametrize("kind", [uci.Power, uci.Gas, uci.MiniBoone])
def test_published_numbers_of_rows_are_tenths_of_their_sum(kind):
    assert tuple(map(len, tenths(range(sum(kind.rows))))) == kind.rows


def test_given_arrays_are_left_alone():
    for prepare, shape in (
        (uci.prepare_power, (50, 8)),
        (uci.prepare_gas, (50, 16)),
        (uci.prepare_miniboone, (50, 43)),
    ):
        data = np.random.default_rng(0).normal(size=shape)
        kept = data.copy()
        prepare(data)
        np.testing.assert_array_equal(data, kept)


# What is refused


def refusal(kind, root, rows=(1, 1, 1), error=ValueError):
    module = small(kind, *rows)(str(root))
    with pytest.raises(error) as caught:
        module.setup()
    assert "\n" not in str(caught.value) and str(root) in str(caught.value)
    assert not module.splits
    return str(caught.value)


@each_set
def test_missing_files_are_named_with_their_source(tmp_path, kind):
    message = refusal(kind, tmp_path, error=FileNotFoundError)
    assert "zenodo.org/record/1161203" in message
    assert {"Power": "power/data.npy", "Gas": "gas/ethylene_CO.csv"}.get(
        kind.__name__, ""
    ) in message


def test_other_numbers_of_rows_are_refused(tmp_path):
    power_file(tmp_path)
    module = uci.Power(str(tmp_path))
    with pytest.raises(ValueError, match=r"expected shapes \[\(1659917, 6\), .* got \[\(167, 6\)"):
        module.setup()


def test_other_columns_are_refused(tmp_path):
    (tmp_path / "power").mkdir()
    np.save(tmp_path / "power" / "data.npy", np.zeros((10, 7)))
    assert "expected 8 columns, got 7" in refusal(uci.Power, tmp_path)
    gas_file(tmp_path, ".npy", np.zeros((10, 19)))
    assert "16 sensors beside Time, Meth and Eth, got 19" in refusal(uci.Gas, tmp_path)


def test_pickles_are_refused(tmp_path):
    (tmp_path / "power").mkdir()
    (tmp_path / "miniboone").mkdir()
    for name in ("power", "miniboone"):
        np.save(tmp_path / name / "data.npy", np.array([[object()] * 8]), allow_pickle=True)
    assert "pickled objects" in refusal(uci.Power, tmp_path)
    assert "pickled objects" in refusal(uci.MiniBoone, tmp_path)
    (tmp_path / "gas").mkdir()
    (tmp_path / "gas" / "ethylene_CO.pickle").write_bytes(b"never opened")
    assert "converted from its pickle" in refusal(uci.Gas, tmp_path, error=FileNotFoundError)


@pytest.mark.parametrize(
    "text",
    ["label\n" + "1,2\n" * 3, "label\n" + "1," * 27 + "x\n", "label\n" + "nan," * 28 + "\n"],
)
def test_bad_hepmass_is_refused(tmp_path, text):
    hepmass_files(tmp_path)
    (tmp_path / "hepmass" / "1000_test.csv").write_text(text)
    assert "1000_test.csv: expected" in refusal(uci.Hepmass, tmp_path)


def test_bad_bsds300_is_refused(tmp_path):
    part = np.zeros((3, 63))
    bsds_file(tmp_path, train=part, validation=part)
    assert "train, validation and test" in refusal(uci.BSDS300, tmp_path)
    bsds_file(tmp_path, train=part, validation=part, test=part[:, :62])
    assert "(3, 62)" in refusal(uci.BSDS300, tmp_path)
    bsds_file(tmp_path, train=part, validation=part, test=np.where(part == 0, np.nan, part))
    assert "got nan in row 0, column 0" in refusal(uci.BSDS300, tmp_path)
    (tmp_path / "BSDS300" / "BSDS300.hdf5").write_bytes(b"no HDF5")
    assert "expected an HDF5 file" in refusal(uci.BSDS300, tmp_path)


@each_set
def test_command_line_reads_the_arguments(kind):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    options = [f"--data=datasets.uci.{kind.__name__}", "--data.batch_size=7"]
    module = parser.instantiate(parser.parse_args(options)).data
    assert isinstance(module, kind) and module.batch_size == 7 and module.root == "data"
