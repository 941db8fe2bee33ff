"""Checking a model's options: names that exist, counts that make sense."""

from collections.abc import Sequence


def check_options(**options: tuple[str, Sequence[str]]) -> None:
    """Refuses an unknown choice: ``check_options(flow=(flow, FLOWS))``.

    Raises:
        ValueError: Naming the option, its value and the values that exist.
    """
    for name, (value, choices) in options.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_positive(**counts: int) -> None:
    """Refuses a count below one: ``check_positive(num_layers=num_layers)``.

    Raises:
        ValueError: Naming the count and its value.
    """
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
