"""What a transformer trunk is made of, as one typed value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

from zoo.errors import ConfigError, near

Norm = Literal["layer", "rms"]
Placement = Literal["pre", "post", "parallel", "branch", "scaled"]
Act = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"]
QKNorm = Literal["none", "layer", "rms"]
ROUTABLE = ("attn_norm", "qkv", "out", "ffn_norm", "ffn", "final_norm")


@dataclass(frozen=True, kw_only=True)
class TrunkConfig:
    """Every way in which the published trunks differ, as data.

    Attributes:
        width: residual width D.
        depth: number of layers.
        heads: attention heads.
        ffn: hidden width of the feed-forward network.
        kv_heads: heads of keys and values (grouped-query attention); ``heads`` by default.
        head_dim: width of a head; ``width / heads`` by default.
        norm: LayerNorm or RMSNorm.
        eps: of every norm of the trunk.
        placement: where a layer's norms stand. ``pre``: x + f(norm(x)). ``post``: norm(x·scale + f(x)).
            ``parallel``: x + attention(norm(x)) + ffn(norm(x)), one norm. ``branch``: x + norm(f(x)).
            ``scaled`` (ChatGLM): norm(x)·scale + f(norm(x)).
        sub_norm: a norm before the attention output projection and before the last FFN matrix (BEiT-3).
        final_norm: a norm after the last layer.
        residual_scale: the scale above, for ``post`` and ``scaled``.
        bias: which of the q, k, v projections own a bias, as letters.
        out_bias, ffn_bias: whether the attention output and the FFN matrices own one.
        act: activation of the FFN (``gelu`` is exact, ``gelu_tanh`` the tanh approximation).
        gated: FFN is down(act(gate(x))·up(x)).
        rope: rotated dimensions of a head (0 = no rotary embedding), in half-split order.
        rope_theta: its base.
        rope_axes: position ids per token; each axis owns rope / axes dimensions.
        rope_half: round the frequencies to half precision, as ChatGLM's stored table is.
        rel_rows: rows of the relative position bias table (0 = none), one column per layer and head.
        qk_norm: norm of queries and keys over a head, before rotary.
        qk_norm_per_head: its affine is [heads, head_dim] instead of shared by the heads.
        qk_eps: its eps; ``eps`` by default.
        bias_kv: one learned key and value per layer, read by every row.
        layer_scale: initial value of a learned scale on every branch; None = no scale.
        dropout: on the output of every branch.
        attention_dropout: on attention weights.
        drop_path: probability of dropping a branch for a sample, rising linearly from 0 to this over the layers.
        blocks: one string per layer out of s (self-attention), c (cross-attention), f (FFN); ``sf`` by default.
        context_width: width of the context that cross-attention reads; ``width`` by default.
        context_norm: a norm on the context, per layer (CoCa).
        cross_modalities: modality ids whose tokens cross-attend; None = all.
        routed: the units with one expert per modality, out of attn_norm, qkv, out, ffn_norm, ffn, final_norm (sub-norms
            and QK-norms go with out/ffn and qkv).
        routes: expert of each modality id, one table for all layers or one per layer.
        init_std: standard deviation of the initial matrices.
    """

    width: int
    depth: int
    heads: int
    ffn: int
    kv_heads: int | None = None
    head_dim: int | None = None
    norm: Norm = "layer"
    eps: float = 1e-5
    placement: Placement = "pre"
    sub_norm: bool = False
    final_norm: bool = True
    residual_scale: float = 1.0
    bias: str = "qkv"
    out_bias: bool = True
    ffn_bias: bool = True
    act: Act = "gelu"
    gated: bool = False
    rope: int = 0
    rope_theta: float = 10000.0
    rope_axes: int = 1
    rope_half: bool = False
    rel_rows: int = 0
    qk_norm: QKNorm = "none"
    qk_norm_per_head: bool = False
    qk_eps: float | None = None
    bias_kv: bool = False
    layer_scale: float | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    blocks: tuple[str, ...] | None = None
    context_width: int | None = None
    context_norm: bool = False
    cross_modalities: tuple[int, ...] | None = None
    routed: tuple[str, ...] = ()
    routes: tuple[int, ...] | tuple[tuple[int, ...], ...] = ()
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "ffn"):
            if getattr(self, name) < (0 if name == "depth" else 1):
                raise ConfigError(f"trunk {name} is {getattr(self, name)}; expected a positive number")
        for name, options in (("norm", Norm), ("placement", Placement), ("act", Act), ("qk_norm", QKNorm)):
            value = getattr(self, name)
            if value not in get_args(options):
                raise ConfigError(f"trunk {name} is {value!r}{near(str(value), get_args(options))}")
        if self.head_dim is None and self.width % self.heads:
            raise ConfigError(f"width {self.width} is not divisible by {self.heads} heads; change one or set head_dim")
        if self.heads % self.keys:
            raise ConfigError(f"{self.heads} heads cannot share {self.keys} kv_heads; expected a divisor")
        if not set(self.bias) <= set("qkv"):
            raise ConfigError(f"bias is {self.bias!r}; expected letters out of 'qkv'")
        if self.rope > self.head or self.rope % (2 * self.rope_axes):
            raise ConfigError(
                f"rope rotates {self.rope} of {self.head} head dimensions on {self.rope_axes} axes;"
                f" expected at most {self.head} and a multiple of {2 * self.rope_axes}"
            )
        if self.residual_scale != 1.0 and self.placement not in ("post", "scaled"):
            raise ConfigError(
                f"residual_scale {self.residual_scale} has no place in {self.placement!r}; use post or scaled"
            )
        for name in ("dropout", "attention_dropout", "drop_path"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"trunk {name} is {getattr(self, name)}; expected 0 <= p < 1")
        self._check_blocks()
        self._check_routes()

    def _check_blocks(self) -> None:
        if len(self.layers) != self.depth:
            raise ConfigError(f"{len(self.layers)} block strings for a depth of {self.depth}; give one per layer")
        for block in self.layers:
            if not block or len(set(block)) != len(block) or not set(block) <= set("scf"):
                raise ConfigError(f"block {block!r}; expected each of s, c, f at most once, such as 'sf' or 'scf'")
            if self.placement == "parallel" and block != "sf":
                raise ConfigError(f"block {block!r} with placement 'parallel'; only 'sf' runs in parallel")
        if self.cross_modalities is not None and not any("c" in block for block in self.layers):
            raise ConfigError(f"cross_modalities {self.cross_modalities}, but no block string has a c")

    def _check_routes(self) -> None:
        unknown = [name for name in self.routed if name not in ROUTABLE]
        if unknown:
            raise ConfigError(f"routed names {unknown[0]!r}{near(unknown[0], ROUTABLE)}")
        if bool(self.routed) != bool(self.routes):
            raise ConfigError(f"routed is {self.routed} and routes {self.routes}; give both or neither")
        if self.routes and isinstance(self.routes[0], tuple) and len(self.routes) != self.depth:
            raise ConfigError(
                f"{len(self.routes)} route tables for a depth of {self.depth}; give one, or one per layer"
            )
        for table in self.tables:
            if set(table) != set(range(max(table, default=-1) + 1)):
                raise ConfigError(f"route table {table} skips an expert; expected every number from 0 on")

    @property
    def keys(self) -> int:
        """Number of key and value heads."""
        return self.kv_heads or self.heads

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.head_dim or self.width // self.heads

    @property
    def layers(self) -> tuple[str, ...]:
        """The block string of every layer."""
        return self.blocks if self.blocks is not None else ("sf",) * self.depth

    @property
    def tables(self) -> tuple[tuple[int, ...], ...]:
        """The route table of every layer (empty tables where nothing is routed)."""
        if self.routes and isinstance(self.routes[0], tuple):
            return self.routes
        return (cast("tuple[int, ...]", self.routes),) * self.depth
