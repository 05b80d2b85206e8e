from khanhllm.units import duration, short


def test_short_numbers():
    assert [short(number) for number in (0, 950, 12_345, 692_196_352, 999_999, 1.5e9, 0.25)] == [
        "0", "950", "12.3 k", "692.2 M", "1 M", "1.5 B", "0.25"
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (0, 59.4, 192, 7500, 273_600)] == ["0s", "59s", "3m12s", "2h05m", "3d04h"]
