"""What there is: every kind of reward with where it runs, its range and what it needs, for people who choose one."""

from collections.abc import Mapping
from typing import NamedTuple


class Entry(NamedTuple):
    """Where it runs, its values (larger is better), what has to be installed, its weights, and what it measures."""

    runs: str
    values: str
    extra: str
    weights: str
    measures: str


CATALOGUE: Mapping[str, Entry] = {
    "aesthetic": Entry("device", "about 1 … 10", "", "CLIP ViT-L/14 and the aesthetic head", "beauty, by LAION's head"),
    "blip_vqa": Entry("device", "0 … 1", "", "BLIP VQA (capfilt large)", "yes to questions about the prompt's parts"),
    "clipscore": Entry("device", "about .9 (.3, 30: its unit)", "", "CLIP ViT-L/14", "likeness of image and prompt"),
    "deqa": Entry("remote", "1 … 5", "remote", "at its server", "technical quality, by a judge"),
    "geneval": Entry("device", "up to 1", "", "Mask2Former Swin-S, CLIP ViT-L/14", "objects, counts, colours, places"),
    "geneval2": Entry("remote", "0 … 1", "remote", "at its server", "answers to questions, by a judge"),
    "hpsv2": Entry("device", "about .2 … .4", "", "HPSv2.1 (CLIP ViT-H/14)", "what people prefer"),
    "hpsv3": Entry("remote", "about 5 … 15", "remote", "at its server", "what people prefer, by a judge"),
    "imagereward": Entry("device", "about -2 … 2", "", "ImageReward (BLIP)", "what people prefer"),
    "jpeg_compressibility": Entry("host", "up to 0, in kB", "", "none", "how small a JPEG is: to try a program"),
    "ocr": Entry("host", "0 … 1", "ocr", "in the package", "the text that the prompt quotes"),
    "pickscore": Entry("device", "about 16 … 26", "", "PickScore (CLIP ViT-H/14)", "what people prefer"),
    "qwenvl": Entry("remote", "1 … 5", "remote", "at its server", "beauty, by a judge"),
    "remote": Entry("remote", "its server's", "remote", "at its server", "whatever a server has under the name"),
    "unifiedreward": Entry("remote", "1 … 5", "remote", "at its server", "alignment and quality, by a judge"),
}
"""By kind. Any but judges can be scored on servers, too; a function of one's own is `package.module:function`."""


def rows() -> list[tuple[str, ...]]:
    """As a table, heads first."""
    heads = ("kind", "runs on", "values", "extra", "weights", "measures")
    return [heads, *((kind, *(cell or "-" for cell in entry)) for kind, entry in CATALOGUE.items())]
