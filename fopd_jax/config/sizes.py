"""Sizes of images: an int is a square's side, a pair is (height, width) like an array's shape."""

import ast
from typing import Annotated

from absl import flags

Pixels = Annotated[int | tuple[int, int], "pixels"]
"""The field's type; annotated, since command lines find a field's parser by its type (`SizeParser`)."""
LARGEST_SIDE = 2**14


def height_width(pixels: int | tuple[int, int]) -> tuple[int, int]:
    """Both sides of an image."""
    return (pixels, pixels) if isinstance(pixels, int) else pixels


def describe_size(pixels: int | tuple[int, int]) -> str:
    """For people: both sides by their names, a square's only once."""
    height, width = height_width(pixels)
    return str(height) if height == width else f"height {height}, width {width}"


def check_size(field: str, pixels: int | tuple[int, int], unit: int, largest: int) -> None:
    """Refuse an image that a network cannot make.

    Raises:
      ValueError: a side is no multiple of `unit`, or beyond `largest`; names the field.
    """
    if any(side % unit or not unit <= side <= largest for side in height_width(pixels)):
        raise ValueError(f"{field}: found {describe_size(pixels)}, expected a multiple of {unit}, at most {largest}")


class SizeParser(flags.ArgumentParser):
    """`512`, `768,512` or `(768, 512)`; whether a side can be is the field's rule to say."""

    def parse(self, argument: str | int | tuple[int, int]) -> int | tuple[int, int]:
        try:
            found = ast.literal_eval(argument) if isinstance(argument, str) else argument
        except (SyntaxError, ValueError):
            found = None
        if type(found) is int:
            return found
        if isinstance(found, tuple) and [type(side) for side in found] == [int, int]:
            height, width = found
            return height, width
        raise ValueError("expected pixels a side, like 512, or height,width, like 768,512")
