"""Types of the benchmarks' flags."""


def at_least_one(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


at_least_one.__name__ = "whole number from 1 on"  # argparse's errors name the type
