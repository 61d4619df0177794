import pytest

from vggenc import UsageError
from vggenc.zsl import load_data, make_toy


def test_the_same_toy_is_drawn_for_the_same_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_toy(tmp_path / name, images=4, seed=seed)
    files = sorted(file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*") if file.is_file())
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    assert load_data(tmp_path / "a").classes != load_data(tmp_path / "c").classes
    with pytest.raises(UsageError, match="isn't empty"):
        make_toy(tmp_path / "a")


def test_toy_classes_have_one_word_of_each_kind_and_every_word_is_seen(data):
    assert (data.attributes.sum(1) == 500).all()
    assert (data.attributes[data.seen].sum(0) >= 200).all()
