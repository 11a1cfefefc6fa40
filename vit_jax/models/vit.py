"""The Vision Transformer (Dosovitskiy et al. 2021) with modules named as the arrays in Google's published files.

The parameter tree is the checkpoint: a file's key "Transformer/encoderblock_0/LayerNorm_0/scale" is the leaf of that
path. The names count layers the way Linen's predecessor did (LayerNorm_0, MultiHeadDotProductAttention_1, LayerNorm_2,
MlpBlock_3). Every value that parity hangs on is written out: tanh GELU, epsilon 1e-6, the order of additions.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from vit_jax.models.resnet import ResNet, precision_of

# Channel means and standard deviations of pixel values in [0, 1] that scale them to [-1, 1], as Google's models expect:
# (x - 127.5) / 127.5 in the original's vit_jax/input_pipeline.py.
GOOGLE_NORMALIZATION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_XAVIER = nn.initializers.xavier_uniform()


def _product(x: jax.Array, kernel: jax.Array, dimensions, precision=None) -> jax.Array:
    """lax.dot_general of x [..., *inner] with kernel [*inner, *outer] for Linen's layers, as one product of two matrices.

    On the CPU, XLA runs its gradients without the copies that it makes for products of more axes.
    """
    axes = len(dimensions[0][1])
    inner, outer = kernel.shape[:axes], kernel.shape[axes:]
    y = lax.dot(x.reshape(-1, math.prod(inner)), kernel.reshape(math.prod(inner), -1), precision=precision)
    return y.reshape(*x.shape[:-axes], *outer)


def dot_product_attention(query, key, value, *, implementation: str, precision: lax.Precision) -> jax.Array:
    """Attention of [B, T, heads, K] by "xla" or "cudnn", softmax in float32; gives no weights away and drops none."""
    query = query / math.sqrt(query.shape[-1])
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(query, key, value, scale=1.0, implementation="cudnn")
    # Heads before tokens: on the CPU, jax.nn's "xla" takes a tenth more of a small model's inference.
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    logits = jnp.matmul(query, key.swapaxes(2, 3), precision=precision, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits).astype(value.dtype)
    return jnp.matmul(weights, value, precision=precision).swapaxes(1, 2)


class MlpBlock(nn.Module):
    """Two dense layers with a GELU in between; [B, T, D] → [B, T, D]."""

    mlp_dim: int
    dropout: float = 0.0
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        bias = nn.initializers.normal(1e-6)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        dense = functools.partial(
            nn.Dense,
            dtype=self.dtype,
            precision=precision_of(self.dtype),
            dot_general=_product,
            kernel_init=_XAVIER,
            bias_init=bias,
        )
        # Both layers are named: named by nesting, the inner call would come first.
        y = drop(nn.gelu(dense(self.mlp_dim, name="Dense_0")(x), approximate=True))
        return drop(dense(x.shape[-1], name="Dense_1")(y))


class EncoderBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm and around a residual; [B, T, D] → [B, T, D]."""

    num_heads: int
    mlp_dim: int
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jax.typing.DTypeLike = jnp.float32
    attention: str = "xla"

    @nn.compact
    def __call__(self, x, train: bool = False):
        precision = precision_of(self.dtype)
        # Linen's own function where weights are asked for or dropped; it alone can do that.
        plain = self.is_mutable_collection("intermediates") or (train and self.attention_dropout > 0)
        fused = functools.partial(dot_product_attention, implementation=self.attention, precision=precision)
        attention = nn.MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            dtype=self.dtype,
            precision=precision,
            kernel_init=_XAVIER,
            dropout_rate=self.attention_dropout,
            broadcast_dropout=False,
            deterministic=not train,
            force_fp32_for_softmax=True,
            attention_fn=nn.dot_product_attention if plain else fused,
            qkv_dot_general=_product,
            out_dot_general=_product,
            name="MultiHeadDotProductAttention_1",
        )
        mlp = MlpBlock(self.mlp_dim, self.dropout, self.dtype, name="MlpBlock_3")
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="LayerNorm_0")(x)
        x = x + nn.Dropout(self.dropout, deterministic=not train)(attention(y, sow_weights=plain))
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="LayerNorm_2")(x)
        return x + mlp(y, train)


class PositionEmbedding(nn.Module):
    """Adds a learned vector to each token; [B, T, D] → [B, T, D]."""

    @nn.compact
    def __call__(self, x):
        shape = (1, *x.shape[1:])
        if self.has_variable("params", "pos_embedding"):
            found: tuple[int, ...] = self.get_variable("params", "pos_embedding").shape
            if found != shape:
                raise ValueError(
                    f"the images make {shape[1]} tokens of {shape[2]} values, the parameters hold positions for "
                    f"{found[1]} of {found[2]}: load(…, image_size=…) resizes the positions to another image size"
                )
        positions = self.param("pos_embedding", nn.initializers.normal(0.02), shape, jnp.float32)
        return x + positions.astype(x.dtype)


class Encoder(nn.Module):
    """Positions, the blocks and a last LayerNorm; [B, T, D] → [B, T, D]."""

    num_layers: int
    num_heads: int
    mlp_dim: int
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jax.typing.DTypeLike = jnp.float32
    attention: str = "xla"
    remat: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = PositionEmbedding(name="posembed_input")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        block = nn.remat(EncoderBlock, static_argnums=(2,)) if self.remat else EncoderBlock
        for i in range(self.num_layers):
            x = block(
                self.num_heads,
                self.mlp_dim,
                self.dropout,
                self.attention_dropout,
                self.dtype,
                self.attention,
                name=f"encoderblock_{i}",
            )(x, train)
        return nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="encoder_norm")(x)


class VisionTransformer(nn.Module):
    """A classifier of images.

    Called with images float32 [B, H, W, 3], usually in [-1, 1], of a height and width that `stride` divides; returns
    float32 logits [B, num_classes], or the features [B, hidden_size] that a head would see where `num_classes` is 0.
    With `train=True` and a dropout above 0 it wants a "dropout" key.

    Parameters are float32; `dtype` is the computation's, in every layer. Softmax and the statistics of LayerNorm are
    computed in float32 whatever it is, and products of float32 are of float32 on a GPU too.
    """

    num_classes: int
    patch_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    classifier: str = "token"  # "token": from a class token; "gap": from the mean of all tokens
    representation_size: int = 0  # width of pre_logits (Dense and tanh before the head); 0: none
    resnet: tuple[int, ...] | None = None  # units of each ResNet stage in front; (): the bare root; None: images
    resnet_width: int = 64
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jax.typing.DTypeLike = jnp.float32
    attention: str = "xla"  # what computes it: "xla" anywhere; "cudnn", fused, on an NVIDIA GPU in bfloat16
    remat: bool = False  # blocks are computed again for the gradient, in a fraction of the memory
    # Channel means and deviations, of values in [0, 1], of the images that the weights were trained on: not computed here,
    # `vit_jax.preprocess` scales by it.
    normalization: tuple[tuple[float, ...], tuple[float, ...]] = GOOGLE_NORMALIZATION

    @property
    def stride(self) -> int:
        """Pixels of the image, in height and width, behind one token."""
        return self.patch_size * (1 if self.resnet is None else 4 * 2 ** max(0, len(self.resnet) - 1))

    @nn.compact
    def __call__(self, images, train: bool = False):
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"expected images [B, H, W, 3], got {list(images.shape)}")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"expected images of floating point numbers, got {images.dtype}: vit_jax.preprocess scales images")
        if self.classifier not in ("token", "gap"):
            raise ValueError(f"classifier must be 'token' or 'gap', got {self.classifier!r}")
        if self.attention not in ("xla", "cudnn"):
            raise ValueError(f"attention must be 'xla' or 'cudnn', got {self.attention!r}")
        if images.shape[1] % self.stride or images.shape[2] % self.stride:
            raise ValueError(
                f"images of {images.shape[1]}×{images.shape[2]} pixels do not divide into patches of {self.stride}"
            )
        x = images.astype(self.dtype)
        if self.resnet is not None:
            resnet = ResNet(self.resnet, self.resnet_width, self.dtype)
            nn.share_scope(self, resnet)  # in the files, root and stages lie at the top of the tree
            x = resnet(x)
        precision = precision_of(self.dtype)
        patches = nn.Conv(
            self.hidden_size,
            kernel_size=2 * (self.patch_size,),
            strides=2 * (self.patch_size,),
            padding="VALID",
            dtype=self.dtype,
            precision=precision,
            name="embedding",
        )
        x = patches(x)
        x = x.reshape(x.shape[0], -1, self.hidden_size)
        if self.classifier == "token":
            token = self.param("cls", nn.initializers.zeros, (1, 1, self.hidden_size), jnp.float32)
            x = jnp.concatenate([jnp.tile(token.astype(x.dtype), (x.shape[0], 1, 1)), x], axis=1)
        x = Encoder(
            self.num_layers,
            self.num_heads,
            self.mlp_dim,
            self.dropout,
            self.attention_dropout,
            self.dtype,
            self.attention,
            self.remat,
            name="Transformer",
        )(x, train)
        x = x[:, 0] if self.classifier == "token" else jnp.mean(x, axis=1)
        if self.representation_size:
            x = nn.tanh(nn.Dense(self.representation_size, dtype=self.dtype, precision=precision, name="pre_logits")(x))
        if self.num_classes:
            zeros = nn.initializers.zeros
            x = nn.Dense(self.num_classes, dtype=self.dtype, precision=precision, kernel_init=zeros, name="head")(x)
        return x.astype(jnp.float32)
