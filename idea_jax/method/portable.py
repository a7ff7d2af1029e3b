"""What acts of a person when they are drawn, as plain arrays in torch's layout: for other programs.

A drawing needs three things of a person: token embeddings, deltas of the cross-attention's key and
value weights, and what the ID-Adapter adds to the text condition. Nothing here needs Flax, an
ID-Enhancer or a face embedding to be used.
"""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from idea_jax import pytrees
from idea_jax.method import condition
from idea_jax.method.modules import IDEnhancer
from idea_jax.models.bundle import ENCODERS

# Deltas by the name that diffusers gives the module: down float32[r, D] and up float32[inner, r];
# the weight [inner, D] grows by `up @ down`.
Deltas = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class PortableAdapter:
    """An ID-Adapter: `contribution` of `idea_jax.diffusers` says how it is used.

    Attributes:
      face: float32[N, D], what is attended to beside the text.
      scale: beta * tanh(gamma).
      attention: weights float32[D, D] as (outputs, inputs) and biases float32[D], by the names
        `to_q.weight`, `to_q.bias` and so on of `to_q`, `to_k`, `to_v`, `to_out`.
    """

    face: np.ndarray
    scale: float
    attention: dict[str, np.ndarray]


@dataclass(frozen=True)
class Portable:
    """What draws a person.

    Attributes:
      tokens: float32[N, D]; of SDXL a dict of those of each encoder, by the names of `ENCODERS`.
      own: deltas of the person's own; empty for none.
      shared: deltas of a shared ID-Enhancer; empty for none.
      adapter: a `PortableAdapter`, of SDXL a dict of one for each encoder; None where no ID-Adapter
        draws.
      shares_adapter: whether `scale` and `attention` of it are a shared ID-Enhancer's.
    """

    tokens: Any
    own: Deltas = field(default_factory=dict)
    shared: Deltas = field(default_factory=dict)
    adapter: Any = None
    shares_adapter: bool = False

    @property
    def is_of_sdxl(self) -> bool:
        """Whether there are two text encoders."""
        return isinstance(self.tokens, Mapping)

    @property
    def each_tokens(self) -> list[np.ndarray]:
        """The tokens of the only text encoder, or of each of two in their order."""
        return [self.tokens[name] for name in ENCODERS] if self.is_of_sdxl else [self.tokens]

    @property
    def widths(self) -> list[int]:
        """Of the text encoders; their sum is the width of the text condition."""
        return [tokens.shape[1] for tokens in self.each_tokens]

    @property
    def adapters(self) -> dict[str, PortableAdapter]:
        """The adapters by the beginning of their tensors' names in files: none for the only one."""
        if self.adapter is None:
            return {}
        if not self.is_of_sdxl:
            return {"": self.adapter}
        return {f"{name}.": self.adapter[name] for name in ENCODERS}


def portable(
    method: condition.Method,
    trainable: condition.Trainable,
    given: condition.Given,
    shared: Mapping | None = None,
) -> Portable:
    """Returns what acts of a person.

    Args:
      trainable, given: of an identity.
      shared: "adapter" and "kv" of the shared tree that the person began with; None for a person
        who needs none.
    """
    words = trainable["pseudo_tokens"]
    tokens = of_each(words, lambda own: np.asarray(own, np.float32), words)
    if not method.acts_at_sampling:
        return Portable(tokens)
    own = deltas(trainable["kv"]) if method.kv != "none" else {}
    ours = deltas(shared["kv"]) if method.shared_kv else {}
    adapter = None
    if method.adapter:
        enhanced = enhanced_of(method, trainable, given)
        network = shared["adapter"] if method.shared_adapter else trainable["adapter"]
        plain = functools.partial(plain_adapter, beta=method.beta)
        adapter = of_each(words, plain, network, enhanced)
    return Portable(tokens, own, ours, adapter, method.shared_adapter)


def of_each(tokens: Any, function: Callable, *trees: Any) -> Any:
    """`function` of the trees of the only text encoder; of two, what it is of the parts of each, as
    a dict: pseudo tokens tell which of both it is."""
    if not isinstance(tokens, Mapping):
        return function(*trees)
    return {name: function(*(tree[name] for tree in trees)) for name in ENCODERS}


def enhanced_of(
    method: condition.Method, trainable: condition.Trainable, given: condition.Given
) -> Any:
    """The ID-Adapter's input, float32[N, 2D]; of two encoders a dict."""
    if method.enhanced:
        return trainable["enhanced"]

    def enhance(enhancer, anchor):
        network = IDEnhancer(np.shape(anchor)[1])
        return network.apply({"params": enhancer}, given["id_embed"], anchor)

    enhancer = trainable["enhancer"] if method.train_enhancer else given["enhancer"]
    return of_each(trainable["pseudo_tokens"], enhance, enhancer, given["anchor"])


def plain_adapter(params: Mapping, enhanced: np.ndarray, beta: float) -> PortableAdapter:
    """The parameters of an `IDAdapter` that sees float32[N, 2D], without its first layer, which
    sees nothing else."""
    project = params["project"]
    kernel, bias = (np.asarray(project[name], np.float32) for name in ("kernel", "bias"))
    attention = {}
    for name, layer in params["attention"].items():
        attention[f"{name}.weight"] = np.asarray(layer["kernel"], np.float32).T
        attention[f"{name}.bias"] = np.asarray(layer["bias"], np.float32)
    scale = beta * np.tanh(np.float64(params["gamma"]))
    face = np.asarray(enhanced, np.float32) @ kernel + bias
    return PortableAdapter(face, float(scale), attention)


def deltas(kv: dict) -> Deltas:
    """K/V deltas, low-rank or full, as pairs of thin matrices. A full one has an identity matrix as
    the other factor, so that nothing of it is lost."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for path, leaf in pytrees.flatten(kv).items():
        layer, part = re.fullmatch(r"(.+?/to_[kv])(?:/(down|up))?", path).groups()
        found.setdefault(module_name(layer), {})[part or "full"] = np.asarray(leaf, np.float32)
    pairs = {}
    for name, parts in found.items():
        if "full" not in parts:
            pairs[name] = parts["down"].T, parts["up"].T
            continue
        D, inner = parts["full"].shape
        if inner <= D:
            pairs[name] = parts["full"].T, np.eye(inner, dtype=np.float32)
        else:
            pairs[name] = np.eye(D, dtype=np.float32), parts["full"].T
    return pairs


def module_name(path: str) -> str:
    """`down_blocks_0/attentions_1/transformer_blocks_0/to_k` as diffusers names that module."""
    *blocks, layer = path.split("/")
    return ".".join([*(re.sub(r"_(\d+)$", r".\1", block) for block in blocks), "attn2", layer])
