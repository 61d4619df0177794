import pytest

from vggenc import Options, UsageError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pool", "mean"),
        ("precision", "int4"),
        ("dtype", "float64"),
        ("image_size", 31),
        ("image_size", 64.0),
        ("batch_size", 0),
        ("batch_size", None),
        ("part_size", 0),
        ("num_workers", -1),
        ("num_workers", True),
        ("num_workers", 1025),
        ("batch_size", 10**6),
        ("part_size", 10**9),
        ("image_size", 10**5),
        ("max_pixels", 0),
    ],
)
def test_values_out_of_range_are_usage_errors_that_name_option_and_value(name, value):
    with pytest.raises(UsageError, match=f"{name}.*{value}"):
        Options(**{name: value})


def test_parts_are_smaller_with_whole_maps():
    assert (
        Options().rows_per_part,
        Options(pool="none").rows_per_part,
        Options(part_size=7).rows_per_part,
    ) == (256, 32, 7)
