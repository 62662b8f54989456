"""The zoo's own components, stated in the same manifest a plugin uses. Data only: nothing heavy is imported here."""

from __future__ import annotations

from typing import Any

from zoo.builtin_blip2 import BLIP2
from zoo.builtin_coca import COCA
from zoo.builtin_cogvlm import COGVLM
from zoo.builtin_commands import COMMANDS
from zoo.builtin_denoisers import DENOISERS
from zoo.builtin_dialogue import DIALOGUE
from zoo.builtin_drawing import DRAWING
from zoo.builtin_glm import GLM
from zoo.builtin_image_tokenizers import DISCRETE_TOKENIZERS
from zoo.builtin_language import LANGUAGE
from zoo.builtin_latents import LATENTS
from zoo.builtin_llamagen import LLAMAGEN
from zoo.builtin_llm_draws import LLM_DRAWS
from zoo.builtin_public_data import PUBLIC_DATA
from zoo.builtin_scenes import SCENES
from zoo.builtin_shards import SHARDS
from zoo.builtin_t5 import T5
from zoo.builtin_tasks import EVALUATIONS
from zoo.builtin_transfusion import TRANSFUSION
from zoo.builtin_unified import UNIFIED
from zoo.plugin import Plugin
from zoo.registry import Component

_VIT_L: dict[str, Any] = {"patch_size": 14, "width": 1024, "depth": 24, "heads": 16, "ffn": 4096}


def _encoder(name: str, config: str, summary: str, **preset: Any) -> Component:
    return Component(kind="encoder", name=name, ref=f"zoo.encoders.{config}", preset=preset, summary=summary)


def _resnet(name: str, blocks: list[int], stem_width: int, embed_width: int, image_size: int) -> Component:
    sizes = {"blocks": blocks, "stem_width": stem_width, "embed_width": embed_width, "image_size": image_size}
    summary = f"CLIP's modified ResNet {name.removeprefix('clip-').upper()} with attention pool, {image_size} px"
    return _encoder(name, "open_clip:OpenCLIPResNetConfig", summary, **sizes)


def _clip_text(width: int) -> Component:
    return Component(
        kind="text_encoder",
        name=f"clip-text-{width}",
        ref="zoo.encoders.open_clip:OpenCLIPTextConfig",
        preset={"width": width, "heads": width // 64, "ffn": 4 * width},
        summary=f"CLIP's causal text transformer, 12 blocks of width {width}",
    )


ENCODERS = (
    _encoder("clip-vit-b-32", "open_clip:OpenCLIPViTConfig", "CLIP ViT-B/32, 224 px, 50 tokens"),
    _encoder("clip-vit-b-16", "open_clip:OpenCLIPViTConfig", "CLIP ViT-B/16, 224 px, 197 tokens", patch_size=16),
    _encoder("clip-vit-l-14", "open_clip:OpenCLIPViTConfig", "CLIP ViT-L/14, 224 px, 257 tokens", **_VIT_L),
    _encoder(
        "clip-vit-l-14-336", "open_clip:OpenCLIPViTConfig", "CLIP ViT-L/14, 336 px, 577 tokens",
        image_size=336, **_VIT_L,
    ),
    _resnet("clip-rn50", [3, 4, 6, 3], 64, 1024, 224),
    _resnet("clip-rn101", [3, 4, 23, 3], 64, 512, 224),
    _resnet("clip-rn50x4", [4, 6, 10, 6], 80, 640, 288),
    _resnet("clip-rn50x16", [6, 8, 18, 8], 96, 768, 384),
    _resnet("clip-rn50x64", [3, 15, 36, 10], 128, 1024, 448),
    _encoder("vit-tiny-16", "vit:ViTConfig", "ViT-Ti/16 on the zoo's trunk", width=192, heads=3, ffn=768),
    _encoder("vit-s-16", "vit:ViTConfig", "ViT-S/16 on the zoo's trunk", width=384, heads=6, ffn=1536),
    _encoder("vit-b-16", "vit:ViTConfig", "ViT-B/16 on the zoo's trunk"),
    _encoder("vit-b-16-256", "vit:ViTConfig", "ViT-B/16 on the zoo's trunk, 256 px, 257 tokens", image_size=256),
    _encoder("vit-b-16-384", "vit:ViTConfig", "ViT-B/16 on the zoo's trunk, 384 px, 577 tokens", image_size=384),
    _encoder("vit-b-16-480", "vit:ViTConfig", "ViT-B/16 on the zoo's trunk, 480 px, 901 tokens", image_size=480),
    _encoder(
        "vit-l-16", "vit:ViTConfig", "ViT-L/16 on the zoo's trunk", width=1024, depth=24, heads=16, ffn=4096
    ),
    _encoder(
        "vit-l-16-384", "vit:ViTConfig", "ViT-L/16 on the zoo's trunk, 384 px, 577 tokens",
        image_size=384, width=1024, depth=24, heads=16, ffn=4096,
    ),
    _encoder(
        "eva-vit-g", "vit:ViTConfig", "EVA-CLIP ViT-g/14 as BLIP-2 reads it: 39 blocks, no final norm",
        patch_size=14, width=1408, depth=39, heads=16, ffn=6144, bias="qv", final_norm=False, pool=False,
    ),
    _encoder("timm-vit", "timm_vit:TimmConfig", "any timm model by name (arch=...), ViT-B/16 by default"),
)  # fmt: skip

TEXT_ENCODERS = tuple(_clip_text(width) for width in (512, 640, 768, 1024))

TOWERS = (
    Component(
        kind="wiring",
        name="towers",
        ref="zoo.models.towers:TowersConfig",
        summary="two encoders that meet in one dot product",
    ),
    Component(
        kind="objective",
        name="contrastive",
        ref="zoo.objectives.contrastive:ContrastiveConfig",
        summary="symmetric in-batch softmax over pairs, negatives from every rank",
    ),
)

CONNECTORS = tuple(
    Component(kind="connector", name=name, ref=f"zoo.connectors.{config}", summary=summary)
    for name, config, summary in (
        ("identity", "simple:IdentityConfig", "the encoder's tokens as they are; widths must be equal"),
        ("linear", "simple:LinearConfig", "one linear map a token (LLaVA)"),
        ("mlp", "simple:MLPConfig", "two linears with GELU between, mlp2x_gelu (LLaVA-1.5)"),
        ("qformer", "qformer:QFormerConfig", "32 learned queries read the image through cross-attention (BLIP-2)"),
        (
            "perceiver-resampler",
            "perceiver_resampler:PerceiverResamplerConfig",
            "64 latents read the image and themselves (Flamingo)",
        ),
        (
            "pixel-shuffle",
            "pixel_shuffle:PixelShuffleConfig",
            "2 x 2 patches folded into channels, then an MLP (InternVL)",
        ),
    )
)


DECODERS = (
    Component(
        kind="decoder",
        name="trunk-lm",
        ref="zoo.decoders.trunk_lm:TrunkLMConfig",
        summary="a causal LM on the zoo's own trunk, like Llama by default",
    ),
    Component(
        kind="decoder",
        name="bert-decoder",
        ref="zoo.decoders.bert_decoder:BertDecoderConfig",
        summary="BERT base that writes: causal, cross-attends an image or a question (BLIP's decoder)",
    ),
)

BRIDGE = (
    Component(
        kind="wiring",
        name="bridge",
        ref="zoo.models.bridge:BridgeConfig",
        summary="image encoder, connector, text decoder: image tokens spliced into the text",
    ),
    Component(
        kind="objective",
        name="next-token",
        ref="zoo.objectives.next_token:NextTokenConfig",
        summary="cross-entropy of the next token, where there is a target",
    ),
)

_MULTIWAY = "zoo.trunks.multiway:MultiwayConfig"
_VLMO_LARGE: dict[str, Any] = {"width": 1024, "depth": 24, "heads": 16, "ffn": 4096, "pair_layers": 3}
_VLMO_PLUS: dict[str, Any] = {
    "width": 544, "depth": 24, "heads": 16, "ffn": 2176, "pair_layers": 3,
    "relative": False, "text_rows": 40, "layer_scale": None,
}  # fmt: skip

_BEIT3: dict[str, Any] = {  # as released: every unit twice, no pair experts (unilm, beit3; torchscale, BEiT3.py)
    "routed": ["attn_norm", "qkv", "out", "ffn_norm", "ffn", "final_norm"], "pair_layers": 0, "text_first": False,
    "relative": False, "text_rows": 1022, "first": 2, "text_norm": False, "kinds": False, "mask_token": True,
    "bias": "qkv", "sub_norm": True, "eps": 1e-5, "layer_scale": None, "dropout": 0.0,
    "tokenizer": "hf:beit3", "vocab_size": 64010, "context_length": 64,
}  # fmt: skip
_BEIT3_LARGE: dict[str, Any] = {**_BEIT3, "width": 1024, "depth": 24, "heads": 16, "ffn": 4096}
_BEIT3_480: dict[str, Any] = {**_BEIT3, "image_size": 480}
_BEIT3_GIANT: dict[str, Any] = {  # as in the paper, table 2: attention shared, pair experts in the last 3 layers
    **_BEIT3, "width": 1408, "depth": 40, "heads": 16, "ffn": 6144, "patch_size": 14,
    "routed": ["ffn_norm", "ffn"], "pair_layers": 3,
}  # fmt: skip

TRUNKS = tuple(
    Component(kind="trunk", name=name, ref=_MULTIWAY, preset=preset, summary=summary)
    for name, preset, summary in (
        ("vlmo-base", {}, "VLMo base: 12 layers of width 768, pair experts in the last 2, relative positions"),
        ("vlmo-base-plus", _VLMO_PLUS, "VLMo base+: 24 layers of width 544, pair experts in the last 3"),
        ("vlmo-large", _VLMO_LARGE, "VLMo large: 24 layers of width 1024, pair experts in the last 3"),
        ("beit3-base", _BEIT3, "BEiT-3 base as released: 12 layers of width 768, every unit of its own for each kind"),
        ("beit3-base-384", {**_BEIT3, "image_size": 384}, "BEiT-3 base for 384 px, as its retrieval files"),
        ("beit3-base-480", _BEIT3_480, "BEiT-3 base for 480 px, as its caption and answer files"),
        ("beit3-large", _BEIT3_LARGE, "BEiT-3 large as released: 24 layers of width 1024"),
        ("beit3-giant", _BEIT3_GIANT, "BEiT-3 of the paper: 40 layers of width 1408, shared attention, 1.9 B weights"),
    )
)

EXPERTS = (
    Component(
        kind="objective",
        name="pair-contrastive",
        ref="zoo.objectives.contrastive:PairContrastiveConfig",
        summary="the contrastive objective behind the pair experts, with its own temperature (VLMo)",
    ),
    Component(
        kind="objective",
        name="masked-text",
        ref="zoo.objectives.masked_text:MaskedTextConfig",
        summary="masked words of a text alone (VLMo's second stage)",
    ),
    Component(
        kind="wiring",
        name="experts",
        ref="zoo.models.experts:ExpertsConfig",
        summary="one trunk with modality experts: images, texts and pairs through the same attention",
    ),
)

IMAGE_TOKENIZERS = (
    Component(
        kind="image_tokenizer",
        name="vq",
        ref="zoo.tokenizers.vq:VQConfig",
        summary="convolutions around 8,192 codes of unit length that follow their vectors; learns from any images",
    ),
    Component(
        kind="image_tokenizer",
        name="vq-480",
        ref="zoo.tokenizers.vq:VQConfig",
        preset={"image_size": 480},
        summary="vq for images of 480 pixels, 30 x 30 codes an image",
    ),
    Component(
        kind="image_tokenizer",
        name="vq-14",
        ref="zoo.tokenizers.vq:VQConfig",
        preset={"patch_size": 14},
        summary="vq for patches of 14 pixels, 16 x 16 codes an image",
    ),
    Component(
        kind="image_tokenizer",
        name="stored-codes",
        ref="zoo.tokenizers.stored:StoredCodesConfig",
        summary="codes computed once, read from a file by the sample's id (path=FILE)",
    ),
)

MASKED_EXPERTS = (
    Component(
        kind="wiring",
        name="experts-masked",
        ref="zoo.models.masked_experts:MaskedExpertsConfig",
        summary="experts beside an image tokenizer: masked images, texts and pairs, captions by [MASK] (BEiT-3)",
    ),
    Component(
        kind="objective",
        name="masked-data",
        ref="zoo.objectives.masked_data:MaskedDataConfig",
        summary="masked words and image codes, alone and in pairs, one loss (BEiT-3)",
    ),
    Component(
        kind="wiring",
        name="labelled",
        ref="zoo.models.labelled:LabelledConfig",
        summary="a trunk with one head over labels: fixed answers, statements about two images, classes",
    ),
    Component(
        kind="objective",
        name="labels",
        ref="zoo.objectives.labels:LabelsConfig",
        summary="cross-entropy of one right label, or binary cross-entropy of any number of them",
    ),
    Component(
        kind="objective",
        name="masked-captioning",
        ref="zoo.objectives.masked_captioning:MaskedCaptioningConfig",
        summary="masked words of a caption that reads the image and its own past (BEiT-3)",
    ),
)

AUTOENCODER = (
    Component(
        kind="wiring",
        name="autoencoder",
        ref="zoo.models.autoencoder:AutoencoderConfig",
        summary="an image tokenizer alone: images to codes and back",
    ),
    Component(
        kind="objective",
        name="vq-reconstruction",
        ref="zoo.objectives.vq_reconstruction:VQReconstructionConfig",
        summary="draw the image again from its codes, and stay near them; trains image tokenizers",
    ),
)

FUSION = (
    Component(
        kind="text_encoder",
        name="albef-bert",
        ref="zoo.encoders.bert:BertConfig",
        summary="BERT base whose last 6 of 12 layers also read the image (ALBEF)",
    ),
    Component(
        kind="text_encoder",
        name="blip-bert",
        ref="zoo.encoders.bert:BertConfig",
        preset={
            "vocab_size": 30524,
            "added": 2,
            "types": 0,
            "text_share": 1.0,
            "cross_share": 1.0,
            "lm_head": False,
        },
        summary="BERT base whose every layer can also read the image (BLIP)",
    ),
    Component(
        kind="wiring",
        name="fusion",
        ref="zoo.models.fusion:FusionConfig",
        summary="two encoders that meet in a dot product; the text's then reads the image (ALBEF, BLIP)",
    ),
    Component(
        kind="wiring",
        name="med",
        ref="zoo.models.med:MEDConfig",
        summary="fusion and a decoder that is one with the text encoder but for self-attention (BLIP)",
    ),
    Component(
        kind="wiring",
        name="writer",
        ref="zoo.models.writer:WriterConfig",
        summary="image encoder and a decoder that cross-attends it (BLIP's captioner)",
    ),
    Component(
        kind="text_encoder",
        name="blip-twin-bert",
        ref="zoo.encoders.twin_bert:TwinBertConfig",
        summary="BERT base whose layers read two images through two cross-attentions (BLIP on NLVR2)",
    ),
    Component(
        kind="wiring",
        name="comparer",
        ref="zoo.models.comparer:ComparerConfig",
        summary="a statement about two images, true or false (BLIP on NLVR2)",
    ),
    Component(
        kind="objective",
        name="verdict",
        ref="zoo.objectives.verdict:VerdictConfig",
        summary="cross-entropy of true and false",
    ),
    Component(
        kind="wiring",
        name="answerer",
        ref="zoo.models.answerer:AnswererConfig",
        summary="a question reads the image, a decoder reads the question's states (ALBEF's and BLIP's VQA)",
    ),
    Component(
        kind="decoder",
        name="albef-decoder",
        ref="zoo.decoders.bert_decoder:BertDecoderConfig",
        preset={"vocab_size": 30522, "added": 0, "types": 2, "depth": 6},
        summary="6 layers of BERT base that write answers and read a question's states (ALBEF)",
    ),
    Component(
        kind="objective",
        name="distilled-answers",
        ref="zoo.objectives.distilled_answers:DistilledAnswersConfig",
        summary="the loss of answers, distilled from a momentum copy (ALBEF)",
    ),
    Component(
        kind="objective",
        name="answers",
        ref="zoo.objectives.answers:AnswersConfig",
        summary="cross-entropy of whole answers, weighted by how many people gave them",
    ),
    Component(
        kind="objective",
        name="momentum-contrastive",
        ref="zoo.objectives.momentum:MomentumContrastiveConfig",
        summary="contrast with a momentum copy's keys, a queue of past ones, and soft targets (ALBEF, BLIP)",
    ),
    Component(
        kind="objective",
        name="matching",
        ref="zoo.objectives.matching:MatchingConfig",
        summary="do image and text belong together? with hard negatives drawn by similarity",
    ),
    Component(
        kind="objective",
        name="masked-lm",
        ref="zoo.objectives.masked_lm:MaskedLMConfig",
        summary="masked words predicted with the image in sight, distilled from a momentum copy",
    ),
)

DATA = (
    Component(
        kind="data",
        name="openmoji",
        ref="zoo.data.openmoji:OpenMojiConfig",
        summary="3,953 hand-drawn icons with their names (CC BY-SA 4.0), embedded; splits random and compositional",
    ),
    Component(
        kind="data",
        name="folder",
        ref="zoo.data.folder:FolderConfig",
        summary="your images with captions in a jsonl or csv file (root=PATH)",
    ),
)

TOKENIZERS = (
    Component(
        kind="tokenizer",
        name="openmoji-bpe",
        ref="zoo.data.text:OpenMojiBpeConfig",
        summary="byte-level BPE of 1,024 tokens for the embedded corpus; any text can be written with it",
    ),
    Component(
        kind="tokenizer",
        name="clip-bpe",
        ref="zoo.data.text:ClipBpeConfig",
        summary="CLIP's byte-level BPE of 49,408 tokens",
    ),
    Component(
        kind="tokenizer",
        name="hf",
        ref="zoo.data.text:HfTokenizerConfig",
        summary="any transformers tokenizer, as hf:FOLDER_OR_HUB_ID",
    ),
)

TASKS = (
    Component(
        kind="task",
        name="retrieval",
        ref="zoo.evaluation.retrieval:RetrievalConfig",
        summary="image-text retrieval both ways: R@1, R@5, R@10, median rank",
    ),
    Component(
        kind="task",
        name="caption-likelihood",
        ref="zoo.evaluation.likelihood:CaptionLikelihoodConfig",
        summary="bits per byte of the reference captions",
    ),
    Component(
        kind="task",
        name="reconstruction",
        ref="zoo.evaluation.reconstruction:ReconstructionConfig",
        summary="PSNR and SSIM of images drawn from their codes or latents, and how many codes are used",
    ),
    Component(
        kind="task",
        name="naming",
        ref="zoo.evaluation.naming:NamingConfig",
        summary="exact match of the generated name, and its rank among 100 names",
    ),
)

PARTS = (*ENCODERS, *TEXT_ENCODERS, *CONNECTORS, *DECODERS, *LANGUAGE, *TRUNKS, *TOKENIZERS, *IMAGE_TOKENIZERS)

WIRED = (
    *TOWERS,
    *COCA,
    *BRIDGE,
    *COGVLM,
    *GLM,
    *BLIP2,
    *DIALOGUE,
    *T5,
    *EXPERTS,
    *MASKED_EXPERTS,
    *AUTOENCODER,
    *DISCRETE_TOKENIZERS,
    *LATENTS,
    *FUSION,
    *TRANSFUSION,
    *UNIFIED,
    *DENOISERS,
    *LLM_DRAWS,
)

PLUGIN = Plugin(
    name="zoo",
    components=(
        *PARTS,
        *WIRED,
        *LLAMAGEN,
        *DATA,
        *PUBLIC_DATA,
        *SHARDS,
        *TASKS,
        *DRAWING,
        *SCENES,
        *EVALUATIONS,
        *COMMANDS,
    ),
)
