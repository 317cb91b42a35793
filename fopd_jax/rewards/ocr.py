"""The OCR reward: how closely the text read in an image matches the text its prompt quotes.

The reading itself is someone else's: a text recogniser at full size, `miniature.scores.read_text` in the miniature.
"""


def quoted_target(prompt: str) -> str:
    """The text between the prompt's first two double quotes, as written.

    Raises:
      ValueError: the prompt has no pair of double quotes, or nothing but spaces between them.
    """
    parts = prompt.split('"', maxsplit=2)
    if len(parts) < 3:
        raise ValueError(f'OCR prompt {prompt!r} must hold its target text in double quotes, like: sign "K7B"')
    if not _normalise(parts[1]):
        raise ValueError(f"OCR prompt {prompt!r} has empty double quotes: write the target text between them")
    return parts[1]


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the least number of insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))  # row[j]: distance of the part of a seen so far to b[:j]
    for i, char_a in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, char_b in enumerate(b, start=1):
            substituted = diagonal + int(char_a != char_b)
            diagonal = row[j]
            row[j] = min(substituted, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def ocr_reward(read: str, prompt: str) -> float:
    """1 - min(d, n) / n in [0, 1]: d the edit distance of `read` to the prompt's quoted target, n the target's length.

    Case and spaces do not count. d is 0 when the target occurs anywhere in `read`, so stray text around it is free.

    Raises:
      ValueError: the prompt quotes no text.
    """
    target, found = _normalise(quoted_target(prompt)), _normalise(read)
    if target in found:
        return 1.0
    return 1.0 - min(edit_distance(found, target), len(target)) / len(target)


def _normalise(text: str) -> str:
    return text.replace(" ", "").lower()
