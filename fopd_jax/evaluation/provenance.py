"""Provenance of images in their metadata: what C2PA's assertions say, as plain text chunks.

It is no manifest: nothing is signed or bound to the pixels, and whoever edits the file can change or remove it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for media that a model has made which was trained on other media."""
CHUNK, XMP, SOFTWARE = "provenance", "XML:com.adobe.xmp", "Software"
"""Names of the text chunks: this project's own, XMP's and PNG's."""


def provenance(settings: Mapping[str, Any], adapters: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Text chunks of an image: who made it, of which kind it is, and hashes of the models that drew it.

    `settings`: of the sampler, with `model`, `model_sha256` and `version`; `adapters`: source and hash of each, if any.
    The action is in the terms of C2PA's `c2pa.actions`, the kind of the source also in XMP, which photo tools read.
    """
    agent = {"name": "fopd_jax", "version": settings["version"]}
    made_by = [{"role": "model", "name": settings["model"], "sha256": settings["model_sha256"]}]
    made_by += [{"role": "adapter", "name": each["source"], "sha256": each["sha256"]} for each in adapters if each]
    action = {"action": "c2pa.created", "digitalSourceType": SOURCE_TYPE, "softwareAgent": agent}
    fields = {"signed": False, "label": "c2pa.actions", "data": {"actions": [action]}, "made_by": made_by}
    software = f"{agent['name']} {agent['version']}"
    return {SOFTWARE: software, CHUNK: json.dumps(fields), XMP: _xmp(software)}


def _xmp(software: str) -> str:
    """An XMP packet, in which IPTC's extension has the property DigitalSourceType."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
        'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        f"xmp:CreatorTool={quoteattr(software)} Iptc4xmpExt:DigitalSourceType={quoteattr(SOURCE_TYPE)}/>"
        '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    )
