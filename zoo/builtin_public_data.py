"""Published sets of the zoo's own manifest (``zoo.builtin``), read by path. Data only."""

from __future__ import annotations

from zoo.registry import Component

PUBLIC_DATA = tuple(
    Component(kind="data", name=name, ref=f"zoo.data.public.{config}", summary=summary)
    for name, config, summary in (
        (
            "coco-karpathy",
            "captions:KarpathyConfig",
            "COCO with five captions an image in Karpathy's splits (root=PATH)",
        ),
        (
            "flickr30k",
            "captions:Flickr30kConfig",
            "Flickr30k with five captions an image in Karpathy's splits (root=PATH)",
        ),
        (
            "vqav2",
            "questions:Vqav2Config",
            "VQAv2: questions with ten answers each (root=PATH, train=, val=, test=FILE)",
        ),
        ("gqa", "questions:GqaConfig", "GQA: questions with one short answer (root=PATH, train=, val=, test=FILE)"),
        (
            "pope",
            "pope:PopeSetConfig",
            "POPE's own questions: is there an object, in three settings (root=PATH, file=PATH)",
        ),
        (
            "refcoco",
            "refcoco:RefcocoConfig",
            "RefCOCO, RefCOCO+ and RefCOCOg: expressions with boxes and masks (file=PATH)",
        ),
    )
)
