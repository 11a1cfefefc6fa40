"""The Vision Transformer (Dosovitskiy et al. 2021) with modules named as the arrays in Google's published files.

The parameter tree is the checkpoint: a file's key "Transformer/encoderblock_0/LayerNorm_0/scale" is the leaf of that
path. The names count layers as Linen's predecessor did (LayerNorm_0, MultiHeadDotProductAttention_1, LayerNorm_2,
MlpBlock_3). Every default that parity depends on is written out: tanh GELU, epsilon 1e-6, the order of additions.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.layers import BlockFields, Dense, SelfAttention, gelu, pad_tokens, precision_of
from vit_jax.models.resnet import ResNet

GOOGLE_NORMALIZATION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # channel means and deviations: (x - 127.5) / 127.5, to [-1, 1]
LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-6)


class MlpBlock(nn.Module):
    """Two dense layers with a GELU between them; [B, T, D] → [B, T, D]."""

    fields: BlockFields

    @nn.compact
    def __call__(self, x, train: bool = False):
        fields = self.fields
        drop = nn.Dropout(fields.dropout, deterministic=not train)
        dense = functools.partial(Dense, dtype=fields.dtype, bias_init=nn.initializers.normal(1e-6))
        y = drop(gelu(dense((fields.mlp_dim,), name="Dense_0")(x)))
        return drop(dense(x.shape[-1:], name="Dense_1")(y))


class EncoderBlock(nn.Module):
    """Attention and MLP, each after a LayerNorm and within a residual connection; [B, T, D] → [B, T, D].

    In training, each image skips each of the two with probability `stochastic_depth`, and what is kept is divided by the
    probability to be kept (Huang et al. 2016; of residual branches and images as in DeiT, Touvron et al. 2021).
    """

    fields: BlockFields

    @nn.compact
    def __call__(self, x, train: bool = False):
        fields = self.fields
        norms = [LayerNorm(dtype=fields.dtype, name=name) for name in ("LayerNorm_0", "LayerNorm_2")]
        attention = SelfAttention(fields, name="MultiHeadDotProductAttention_1")
        drop = nn.Dropout(fields.dropout, deterministic=not train)
        mlp = MlpBlock(fields, name="MlpBlock_3")
        keep = nn.Dropout(fields.stochastic_depth, broadcast_dims=(1, 2), deterministic=not train, name="stochastic_depth")

        x = x + keep(drop(attention(norms[0](x))))
        return x + keep(mlp(norms[1](x), train))


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
    fields: BlockFields
    remat: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = PositionEmbedding(name="posembed_input")(x)
        x = pad_tokens(nn.Dropout(self.fields.dropout, deterministic=not train)(x), self.fields.attention)
        block = nn.remat(EncoderBlock, static_argnums=(2,)) if self.remat else EncoderBlock
        for i in range(self.num_layers):
            rate = self.fields.stochastic_depth * i / max(1, self.num_layers - 1)  # from 0 at the first block
            x = block(dataclasses.replace(self.fields, stochastic_depth=rate), name=f"encoderblock_{i}")(x, train)
        return LayerNorm(dtype=self.fields.dtype, name="encoder_norm")(x[:, : self.fields.tokens])


class VisionTransformer(nn.Module):
    """A classifier of images.

    Parameters are float32; `dtype` is the computation's, in every layer. Softmax and the statistics of LayerNorm are
    always computed in float32, and products of float32 are computed in float32 on a GPU too.

    Args of a call:
      images: float32 [B, H, W, 3], usually in [-1, 1]; `stride` must divide H and W.
      train: whether dropout and stochastic depth are active; they then need a "dropout" key.

    Returns:
      Logits float32 [B, num_classes], or, if `num_classes` is 0, the features [B, hidden_size] that a head would see.
    """

    num_classes: int
    patch_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    classifier: str = "token"  # "token": from a class token; "gap": from the mean of all tokens
    representation_size: int = 0  # width of pre_logits (Dense and tanh before the head); 0: none
    resnet: tuple[int, ...] | None = None  # units of each ResNet stage before the patches; (): the bare root; None: no ResNet
    resnet_width: int = 64
    dropout: float = 0.0
    attention_dropout: float = 0.0
    stochastic_depth: float = 0.0  # of the last block; it rises linearly from 0 at the first
    dtype: jax.typing.DTypeLike = jnp.float32
    attention: str = "xla"  # what computes it: "xla" anywhere; "cudnn", fused, on an NVIDIA GPU in bfloat16
    remat: bool = False  # blocks are computed again for the gradient, in a fraction of the memory
    # How `vit_jax.preprocess` prepares images for the weights: by channel means and deviations, of values in [0, 1], and by
    # a crop (config.Augment.eval_crop). The model does not compute with either.
    normalization: tuple[tuple[float, ...], tuple[float, ...]] = GOOGLE_NORMALIZATION
    eval_crop: str = "none"

    @property
    def stride(self) -> int:
        """Pixels of the image, in height and width, per token."""
        return self.patch_size * (1 if self.resnet is None else 4 * 2 ** max(0, len(self.resnet) - 1))

    def _check(self, images) -> None:
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"expected images [B, H, W, 3], got {list(images.shape)}")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"expected images of floating point numbers, got {images.dtype}: vit_jax.preprocess scales images")
        for name, allowed in (("classifier", ("token", "gap")), ("attention", ("xla", "cudnn"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be {allowed[0]!r} or {allowed[1]!r}, got {getattr(self, name)!r}")
        _, height, width, _ = images.shape
        if height % self.stride or width % self.stride:
            raise ValueError(f"images of {height}×{width} pixels do not divide into patches of {self.stride}")

    @nn.compact
    def __call__(self, images, train: bool = False):
        self._check(images)
        precision, dtype = precision_of(self.dtype), self.dtype
        x = images.astype(dtype)
        if self.resnet is not None:
            resnet = ResNet(self.resnet, self.resnet_width, dtype)
            nn.share_scope(self, resnet)  # in the files, root and stages lie at the top of the tree
            x = resnet(x)
        patch = (self.patch_size, self.patch_size)
        embedding = nn.Conv(self.hidden_size, patch, patch, "VALID", dtype=dtype, precision=precision, name="embedding")
        x = embedding(x)
        x = x.reshape(x.shape[0], -1, self.hidden_size)
        if self.classifier == "token":
            token = self.param("cls", nn.initializers.zeros, (1, 1, self.hidden_size), jnp.float32)
            x = jnp.concatenate([jnp.tile(token.astype(dtype), (x.shape[0], 1, 1)), x], axis=1)
        attention_dropout = self.attention_dropout if train else 0.0
        attention = "linen" if attention_dropout or self.is_mutable_collection("intermediates") else self.attention
        rates = (self.dropout, attention_dropout, self.stochastic_depth)
        fields = BlockFields(self.num_heads, self.mlp_dim, *rates, dtype, attention, x.shape[1])
        x = Encoder(self.num_layers, fields, self.remat, name="Transformer")(x, train)
        x = x[:, 0] if self.classifier == "token" else jnp.mean(x, axis=1)
        if self.representation_size:
            x = nn.tanh(nn.Dense(self.representation_size, dtype=dtype, precision=precision, name="pre_logits")(x))
        if self.num_classes:
            zeros = nn.initializers.zeros
            x = nn.Dense(self.num_classes, dtype=dtype, precision=precision, kernel_init=zeros, name="head")(x)
        return x.astype(jnp.float32)
