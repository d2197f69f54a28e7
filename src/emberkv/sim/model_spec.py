"""A transformer's shape, in parameters and bytes; no weights are needed."""

from dataclasses import dataclass, replace

from emberkv.errors import ConfigError

DTYPE_BITS = {"fp32": 32.0, "fp16": 16.0, "bf16": 16.0, "fp8": 8.0, "int4": 4.25}
"""Bits of a parameter. 4-bit weights come with a 16-bit scale and a 16-bit zero point for each group of 128."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shapes of a decoder. intermediate: width of a dense layer's MLP; of one expert: expert_intermediate.

    moe_layers: how many layers are mixtures of ``experts``, of which a token goes through experts_per_token and,
    always, a shared one of width shared_intermediate. window: tokens that a query sees in window_layers of the layers;
    the others see all. weights_dtype: of the layers' linear weights; embeddings, norms and routers have base_dtype, as
    quantised checkpoints leave them. context: the most tokens that the model was made for.

    >>> from emberkv.sim.model_config import load_spec
    >>> spec = load_spec("llama-3.1-8b")
    >>> spec.parameters, spec.kv_bytes_per_token, spec.context
    (8030261248, 131072, 131072)
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int
    tied: bool = False
    moe_layers: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    window: int = 0
    window_layers: int = 0
    qkv_bias: bool = False
    output_bias: bool = False
    head_norms: bool = False
    norms: int = 2
    base_dtype: str = "bf16"
    weights_dtype: str = "bf16"
    kv_dtype: str = "bf16"

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of the keys of one token and layer; values are as many."""
        return self.kv_heads * self.head_dim

    @property
    def attention_parameters(self) -> int:
        """Of one layer's linear weights."""
        return self.hidden * (2 * self.query_size + 2 * self.kv_size)

    @property
    def linear_parameters(self) -> int:
        """All layers' linear weights, every expert included: what quantisation shrinks."""
        dense = (self.layers - self.moe_layers) * 3 * self.hidden * self.intermediate
        expert = 3 * self.hidden * self.expert_intermediate
        shared = 3 * self.hidden * self.shared_intermediate
        return self.layers * self.attention_parameters + dense + self.moe_layers * (self.experts * expert + shared)

    @property
    def other_parameters(self) -> int:
        """Embedding, output head, norms, biases and routers."""
        biases = (self.query_size + 2 * self.kv_size) * self.qkv_bias + self.hidden * self.output_bias
        each_layer = self.norms * self.hidden + biases + 2 * self.head_dim * self.head_norms
        routers = self.moe_layers * (self.hidden * self.experts + self.hidden * (self.shared_intermediate > 0))
        return (1 if self.tied else 2) * self.vocab * self.hidden + self.layers * each_layer + self.hidden + routers

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters

    @property
    def active_parameters(self) -> int:
        """Those that one token goes through; the embedding counts whole."""
        idle = self.moe_layers * (self.experts - self.experts_per_token) * 3 * self.hidden * self.expert_intermediate
        return self.parameters - idle

    @property
    def weight_bytes(self) -> int:
        return round(
            (self.linear_parameters * DTYPE_BITS[self.weights_dtype]) / 8
            + self.other_parameters * DTYPE_BITS[self.base_dtype] / 8
        )

    @property
    def kv_bytes_per_layer(self) -> int:
        """Bytes of one token's keys and values in one layer."""
        return round(2 * self.kv_size * DTYPE_BITS[self.kv_dtype] / 8)

    @property
    def kv_bytes_per_token(self) -> int:
        """Over all layers; a window's layers keep theirs too, as a shared prefix cache needs them."""
        return self.layers * self.kv_bytes_per_layer

    def with_dtypes(self, *, weights: str | None = None, kv: str | None = None) -> "ModelSpec":
        """The same shapes in other types. Raises ConfigError naming those accepted."""
        for given in (weights, kv):
            if given is not None and given not in DTYPE_BITS:
                raise ConfigError(f"dtype is {given!r}; use one of {', '.join(DTYPE_BITS)}")
        if kv == "int4":
            raise ConfigError("the KV dtype is 'int4'; use one of fp32, fp16, bf16, fp8")
        return replace(self, weights_dtype=weights or self.weights_dtype, kv_dtype=kv or self.kv_dtype)
