"""Tables: what is read from files, how it is divided, and everything that is refused."""

import os
import pickle
import sys
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from pytorch_lightning import LightningDataModule
from sklearn.datasets import load_breast_cancer

from datasets.tabular import BreastCancer, Table
from flows.recipes import RotationSplineFlow
from flows.training import DensityEstimator

NAMES = ["a", "b", "c", "name"]
SUFFIXES = [
    ".csv",
    ".npy",
    pytest.param(
        ".parquet",
        marks=pytest.mark.skipif(not find_spec("pyarrow"), reason="pyarrow is not installed"),
    ),
]
each_suffix = pytest.mark.parametrize("suffix", SUFFIXES)


def numbers(rows=40, columns=3, seed=0):
    """Rows that can be told apart, each entry exact in float32."""
    values = np.random.default_rng(seed).integers(-1000, 1000, size=(rows, columns)) / 8
    values[:, 0] = np.arange(rows)
    return values


def write(path, values, names=None):
    names = NAMES[: values.shape[1]] if names is None else names
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".csv":
        rows = [",".join(names)] + [",".join(map(repr, row)) for row in values.tolist()]
        path.write_text("\n".join(rows) + "\n")
    else:
        import pyarrow
        from pyarrow import parquet

        columns = {name: values[:, i] for i, name in enumerate(names)}
        parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def ready(*args, **kwargs):
    module = Table(*args, **kwargs)
    module.setup("fit")
    return module


def rows_of(module):
    return {name: tensors[0] for name, tensors in module.splits.items()}


# What is read


@each_suffix
def test_every_row_is_in_exactly_one_split(tmp_path, suffix):
    values = numbers()
    module = ready(write(tmp_path / f"t{suffix}", values), val_fraction=0.2, test_fraction=0.1)
    splits = rows_of(module)
    assert {name: len(x) for name, x in splits.items()} == {"train": 28, "val": 8, "test": 4}
    assert module.shape == (3,) and module.context_features is None
    together = torch.cat(list(splits.values()))
    assert together.dtype == torch.float32
    together = together[together[:, 0].argsort()]
    assert torch.equal(together, torch.from_numpy(values).float())


@each_suffix
def test_columns_are_chosen_by_name_or_position_in_the_order_asked(tmp_path, suffix):
    values = numbers()
    path = write(tmp_path / f"t{suffix}", values)
    by_name = {"features": ["c", 0], "context": ["b"]}
    by_position = {"features": [2, 0], "context": [1]}
    asked = by_position if suffix == ".npy" else by_name
    module = ready(path, **asked, split_seed=None)
    inputs, context = (torch.cat(parts) for parts in zip(*module.splits.values(), strict=True))
    np.testing.assert_array_equal(inputs, values[:, [2, 0]])
    np.testing.assert_array_equal(context, values[:, [1]])
    assert module.shape == (2,) and module.context_features == 1
    assert module.columns == (("2", "0") if suffix == ".npy" else ("c", "a"))


def test_features_are_what_is_no_context_by_default(tmp_path):
    module = ready(write(tmp_path / "t.csv", numbers()), context=["b"], split_seed=None)
    np.testing.assert_array_equal(module.splits["train"][0], numbers()[:32, [0, 2]])


def test_without_a_split_seed_the_last_rows_test_and_those_before_validate(tmp_path):
    module = ready(write(tmp_path / "t.csv", numbers()), split_seed=None)
    first = {name: x[:, 0].tolist() for name, x in rows_of(module).items()}
    assert first["train"] == list(range(32))
    assert first["val"] == [32, 33, 34, 35] and first["test"] == [36, 37, 38, 39]


def test_the_division_depends_on_the_split_seed_alone(tmp_path):
    path = write(tmp_path / "t.csv", numbers())

    def test_rows(**seeds):
        return rows_of(ready(path, **seeds))["test"][:, 0].tolist()

    assert test_rows(seed=5) == test_rows() != test_rows(split_seed=1)


def test_rows_keep_their_context_through_division_and_batches(tmp_path):
    values = numbers()
    values[:, 1] = -values[:, 0]
    path = write(tmp_path / "t.csv", values)
    module = ready(path, features=[0], context=[1], batch_size=5)
    for loader in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader()):
        for inputs, context in loader:
            assert torch.equal(inputs, -context)


def test_columns_that_are_not_chosen_may_hold_anything(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("name,a,b\n" + "".join(f"x{i},{i},nan\n" for i in range(30)))
    module = ready(str(path), features=["a"])
    assert len(module.splits["train"][0]) == 24


@pytest.mark.parametrize(
    "text",
    {
        "quotes": '"a","b"\n' + '"1","2.5"\n3,4\n' * 10,
        "byte order mark": "\ufeffa,b\n" + "1,2.5\n3,4\n" * 10,
        "windows": "a,b\r\n" + "1,2.5\r\n3,4\r\n" * 10,
        "blank lines": "\na,b\n" + "1,2.5\n\n3,4\n" * 10 + "\n\n",
        "spaces": " a, b \n" + " 1, 2.5\n3 ,4e0\n" * 10,
        "no newline at the end": "a,b\n" + "1,2.5\n3,4\n" * 9 + "1,2.5\n3,4",
    }.values(),
    ids=["quotes", "byte order mark", "windows", "blank lines", "spaces", "no newline at the end"],
)
def test_csv_comes_in_many_dresses(tmp_path, text):
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode())
    module = ready(str(path), features=["a", "b"], split_seed=None)
    expected = torch.tensor([[1, 2.5], [3, 4]]).repeat(8, 1)
    assert torch.equal(module.splits["train"][0], expected)


def test_other_delimiters_are_read_when_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a;b\n" + "1;2\n3;4\n" * 10)
    assert ready(str(path), delimiter=";").shape == (2,)


def test_pandas_without_names_numbers_its_columns(tmp_path):
    path = write(tmp_path / "t.csv", numbers(), names=["0", "1", "2"])
    assert ready(path, features=["2", 0]).shape == (2,)


@pytest.mark.parametrize("dtype", ["int16", "uint8", "float32", ">f8", "float16"])
def test_npy_of_any_real_type_and_order_is_read(tmp_path, dtype):
    values = np.asfortranarray(np.arange(40).reshape(20, 2).astype(dtype))
    np.save(tmp_path / "t.npy", values)
    module = ready(str(tmp_path / "t.npy"), split_seed=None)
    assert torch.equal(module.splits["train"][0], torch.arange(32.0).reshape(16, 2))


def test_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "t.csv", numbers())
    assert ready("~/t.csv").shape == (3,)


def test_large_offsets_keep_their_digits(tmp_path):
    values = numbers()
    values[:, 1] += 1e9
    path = write(tmp_path / "t.csv", values)
    module = ready(path, features=["a", "b"], context=["c"], split_seed=None)
    inputs, context = module.splits["train"]
    assert inputs.dtype == torch.float64 and context.dtype == torch.float32
    np.testing.assert_array_equal(inputs, values[:32, :2])


def test_setup_again_reads_nothing(tmp_path):
    module = ready(write(tmp_path / "t.csv", numbers()))
    (tmp_path / "t.csv").unlink()
    before = module.splits
    module.setup("test")
    assert module.splits is before


@pytest.mark.parametrize("chosen", ["[b, 0]", '["b", 0]'])
def test_command_line_reads_names_and_positions(chosen):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    arguments = ["--data=datasets.tabular.Table", "--data.path=t.csv", f"--data.features={chosen}"]
    data = parser.instantiate(parser.parse_args(arguments)).data
    assert data.features == ["b", 0] and data.context == ()


# What is refused


def refusal(path, **arguments):
    """The message, one line that names the file, and nothing is left half done."""
    module = Table(str(path), **arguments)
    with pytest.raises(ValueError) as caught:
        module.setup()
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 700
    assert not module.splits
    return message


GOOD = "a,b\n" + "".join(f"{i},{i * i}\n" for i in range(30))
# name -> text of a CSV file and what the message says of it
BAD = {
    "empty": ("", ["header row", "empty file"]),
    "only blank lines": ("\n\n\n", ["empty file"]),
    "no rows": ("a,b\n", ["at least 10 rows", "got 0"]),
    "few rows": ("a,b\n1,2\n3,4\n", ["at least 10 rows", "got 2"]),
    "no header": ("1,2\n" * 30, ["column names in the first row", "'1', '2'"]),
    "text": (GOOD + "7,blue\n", ["'blue'", "line 32", "'b'"]),
    "empty cell": (GOOD + "7,\n", ["''", "line 32", "'b'"]),
    "nan": (GOOD + "nan,1\n", ["got nan", "line 32", "'a'"]),
    "infinity": (GOOD + "1,-inf\n", ["got -inf", "line 32", "'b'"]),
    "overflow": (GOOD + "1,1e999\n", ["got inf", "line 32", "'b'"]),
    "decimal comma": ('a,b\n"1,5",2\n' + "1,2\n" * 30, ["'1,5'", "line 2", "'a'"]),
    "long row": (GOOD + "1,2,3\n1,2\n", ["2 cells", "got 3 in line 32"]),
    "short row": (GOOD + "1\n1,2\n", ["2 cells", "got 1 in line 32"]),
    "constant": ("a,b\n" + "".join(f"{i},7\n" for i in range(30)), ["vary", "got 7", "24", "'b'"]),
    "duplicate name": ("a,b,a\n" + "1,2,3\n" * 30, ["'a'", "columns 0 and 2"]),
    "missing name": (",b\n" + "1,2\n" * 30, ["a name for every column", "none for 0"]),
    "other delimiter": ("a;b\n" + "1;2\n" * 30, ["'1;2'", "line 2", "'a;b'"]),
    "endless line": ("a,b," + "c" * 2_000_000, ["line", "1048576 characters"]),
    "endless name": ("a," + "b" * 200_000 + "\n1,2\n", ["field limit"]),
    "unclosed quote": ('a,b\n1,"2\n' + "1,2\n" * 60_000, ["line", "field limit"]),
}


def test_a_context_that_never_varies_is_refused(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b,c\n" + "".join(f"{i},7,{-i}\n" for i in range(30)))
    with pytest.raises(ValueError, match="got 7 in all 24 training rows of 'b'"):
        Table(str(path), context=["c", "b"]).setup()


@pytest.mark.parametrize("name", BAD)
def test_bad_csv_is_refused_in_one_line(tmp_path, name):
    text, words = BAD[name]
    path = tmp_path / "t.csv"
    path.write_text(text)
    message = refusal(path)
    for word in words:
        assert word in message


def test_csv_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"a,b\n" + bytes(range(128, 256)) * 20)
    assert "UTF-8" in refusal(path)


@pytest.mark.parametrize(
    "arguments, words",
    {
        "missing name": ({"features": ["a", "z"]}, ["'a', 'b'", "got 'z'"]),
        "missing position": ({"features": [0, 2]}, ["2 columns", "got 2"]),
        "negative position": ({"context": [-1]}, ["got -1"]),
        "twice": ({"features": ["a", 0]}, ["'a'", "twice"]),
        "feature and context": ({"features": ["a", "b"], "context": ["b"]}, ["'b'", "both"]),
        "nothing to model": ({"context": ["a", "b"]}, ["at least one column"]),
        "no features": ({"features": []}, ["at least one column"]),
        "few rows for these fractions": ({"val_fraction": 0.01}, ["at least 100 rows", "got 30"]),
    }.values(),
    ids=lambda value: " ".join(value)[:40],
)
def test_bad_choice_of_columns_is_refused(tmp_path, arguments, words):
    path = tmp_path / "t.csv"
    path.write_text(GOOD)
    message = refusal(path, **arguments)
    for word in words:
        assert word in message


def npy(values):
    def make(path):
        np.save(path, values, allow_pickle=True)

    return make


def claims_more_than_it_holds(path):
    np.save(path, np.zeros((4, 2)))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"(4, 2)", b"(9**9, 2)".replace(b"9**9", b"999999999")))


def huge_header(path):
    fields = [(f"f{i}", "<f8") for i in range(5000)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.save(path, np.zeros(2, dtype=fields))


BAD_NPY = {
    "empty": (lambda path: path.write_bytes(b""), ["NPY"]),
    "no npy": (lambda path: path.write_bytes(b"a,b\n1,2\n" * 20), ["NPY"]),
    "pickle": (lambda path: path.write_bytes(pickle.dumps([[1.0, 2.0]])), ["NPY"]),
    "pickled objects": (npy(np.array([[1, None]], dtype=object)), ["pickled objects"]),
    "cut": (lambda path: (npy(numbers())(path), os.truncate(path, 200)), ["NPY"]),
    "claims 16 GB": (claims_more_than_it_holds, ["NPY"]),
    "huge header": (huge_header, ["NPY"]),
    "one dimension": (npy(np.zeros(50)), ["(rows, columns)", "(50,)"]),
    "three dimensions": (npy(np.zeros((5, 2, 2))), ["(rows, columns)", "(5, 2, 2)"]),
    "text": (npy(np.array([["a", "b"]])), ["real numbers", "<U1"]),
    "complex": (npy(np.zeros((50, 2), complex)), ["real numbers", "complex128"]),
    "no rows": (npy(np.zeros((0, 2))), []),
    "nan": (npy(np.where(numbers() == 12, np.nan, numbers())), ["nan in row 12", "column 0"]),
}


@pytest.mark.parametrize("name", BAD_NPY)
def test_bad_npy_is_refused_in_one_line(tmp_path, name):
    make, words = BAD_NPY[name]
    make(tmp_path / "t.npy")
    message = refusal(tmp_path / "t.npy")
    for word in words:
        assert word in message


def test_bad_parquet_is_refused_in_one_line(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    path.write_bytes(b"")
    assert "Parquet" in refusal(path)
    path.write_bytes(b"PAR1" + bytes(1000))
    assert "Parquet" in refusal(path)
    parquet.write_table(pyarrow.table({"a": [1.0] * 30, "b": ["x"] * 30}), path)
    assert "string in column 'b'" in refusal(path)
    parquet.write_table(pyarrow.table({"a": [1, None] * 15, "b": range(30)}), path)
    assert "nan in row 1" in refusal(path)
    content = path.read_bytes()
    path.write_bytes(content[:20] + bytes(30) + content[50:])
    assert "Parquet" in refusal(path) or "finite" in refusal(path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"pyarrow.*\[tables\]"):
        Table(str(tmp_path / "t.parquet")).setup()


@pytest.mark.parametrize("name", ["t.pkl", "t.txt", "t", "t.csv.gz"])
def test_other_files_are_refused(tmp_path, name):
    (tmp_path / name).write_text(GOOD)
    assert ".csv, .npy or .parquet" in refusal(tmp_path / name)


def test_missing_files_folders_and_pipes_are_refused_without_waiting(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    for name in ("nowhere.csv", "folder.csv", "pipe.csv"):
        with pytest.raises(FileNotFoundError, match=name):
            Table(str(tmp_path / name)).setup()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"val_fraction": 0.0}, "val_fraction must lie between 0 and 1, got 0.0"),
        ({"test_fraction": 1.0}, "test_fraction must lie between 0 and 1, got 1.0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave rows to train on, got 0.5 and 0.5"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"delimiter": "::"}, "delimiter must be one character, got '::'"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_once(arguments, words):
    with pytest.raises(ValueError, match=words):
        Table("t.csv", **arguments)


# With a flow


def initialized(path, **arguments):
    module = ready(path, **arguments)
    torch.manual_seed(0)
    flow = RotationSplineFlow(2, layers=2, context_features=1)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    DensityEstimator(flow).initialize(module)
    return flow.eval().requires_grad_(False), module.splits["test"]


@pytest.mark.parametrize("offset", [0.0, 1e9], ids=str)
def test_densities_samples_and_contexts_are_in_the_units_of_the_file(tmp_path, offset):
    values = np.random.default_rng(0).normal(size=(500, 3))
    scale, shift = np.array([3.0, 1e-3, 40.0]), np.array([offset, -7.0, offset])
    chosen = {"features": ["a", "b"], "context": ["c"]}
    plain, (x, c) = initialized(write(tmp_path / "plain.csv", values), **chosen)
    scaled, (y, d) = initialized(write(tmp_path / "scaled.csv", values * scale + shift), **chosen)
    # The same rows in other units: the density changes by the volume of the unit cell.
    expected = plain.log_prob(x, c) - np.log(scale[:2]).sum()
    torch.testing.assert_close(scaled.log_prob(y, d).float(), expected, atol=2e-3, rtol=1e-3)

    def samples(flow, context):
        torch.manual_seed(1)
        return flow.double().sample(5, context.double()).numpy()

    back = (samples(scaled, d) - shift[:2]) / scale[:2]
    np.testing.assert_allclose(back, samples(plain, c), atol=2e-3, rtol=1e-3)


# Breast cancer


def test_breast_cancer_is_scikit_learns_table_in_its_own_units():
    module = BreastCancer(labels=True, split_seed=None)
    module.setup("fit")
    assert module.shape == (30,) and module.classes == 2
    assert {name: len(x) for name, (x, _) in module.splits.items()} == {
        "train": 399,
        "val": 85,
        "test": 85,
    }
    inputs, labels = (torch.cat(parts) for parts in zip(*module.splits.values(), strict=True))
    data = load_breast_cancer()
    assert inputs.dtype == torch.float32 and labels.dtype == torch.int64
    np.testing.assert_array_equal(inputs, data.data.astype(np.float32))
    np.testing.assert_array_equal(labels, data.target)


def test_breast_cancer_gives_no_labels_unless_asked():
    module = BreastCancer()
    module.setup()
    assert module.classes is None and len(module.splits["train"]) == 1
    other = BreastCancer(split_seed=1)
    other.setup()
    assert not torch.equal(module.splits["test"][0], other.splits["test"][0])
