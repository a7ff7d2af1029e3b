"""The `official` profile against the published arithmetic, done by torch from its description.

Same initial tensors, pictures, flips, noise, timesteps and texts; torch's own attention,
covariance, pseudo-inverse and AdamW; the frozen networks are those of diffusers and transformers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from torch import nn

from idea_jax.method import condition
from idea_jax.models import sd
from idea_jax.pytrees import stream
from idea_jax.training.step import Photos, draw_batch, init_state, make_optimizer, train_step

STEPS, BATCH, LR, REG_WEIGHT = 5, 4, 1.5e-3 * 8, 8e-4
D = 32  # text width of the small sd2 models


class TorchEnhancer(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand = nn.Linear(512, D)
        self.query = nn.Linear(D, D)
        self.key_value = nn.Linear(D, D)
        self.attention = nn.MultiheadAttention(D, 8, batch_first=True)
        self.out = nn.Linear(D, 2 * D)

    def forward(self, face, anchor):
        query = self.query(self.expand(face).expand(len(anchor), -1))[None]
        keys = self.key_value(anchor)[None]
        return self.out(self.attention(query, keys, keys)[0][0])


class TorchAdapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))
        self.project = nn.Linear(2 * D, D)
        self.attention = nn.MultiheadAttention(D, 8, batch_first=True)

    def forward(self, y, enhanced):
        joined = torch.cat([y, self.project(enhanced).expand(len(y), -1, -1)], dim=1)
        attended = self.attention(joined, joined, joined)[0]
        return y + 0.4 * torch.tanh(self.gamma) * attended[:, : y.shape[1]]


def copy_linear(target, source):
    target.weight.data = torch.tensor(np.asarray(source["kernel"]).T.copy())
    target.bias.data = torch.tensor(np.asarray(source["bias"]))


def copy_attention(target, source):
    packed = [np.asarray(source[name]["kernel"]).T for name in ("to_q", "to_k", "to_v")]
    target.in_proj_weight.data = torch.tensor(np.concatenate(packed))
    biases = [np.asarray(source[name]["bias"]) for name in ("to_q", "to_k", "to_v")]
    target.in_proj_bias.data = torch.tensor(np.concatenate(biases))
    copy_linear(target.out_proj, source["to_out"])


def copy_parameters(module, params):
    for name, source in params.items():
        if name == "gamma":
            module.gamma.data = torch.tensor(np.asarray(source)).reshape(1)
        elif name == "attention":
            copy_attention(module.attention, source)
        else:
            copy_linear(getattr(module, name), source)


def torch_regulariser(tokens, anchor):
    covariance = torch.cov(anchor.T) + 2e-5 * torch.eye(anchor.shape[1])
    inverse = torch.linalg.pinv(covariance)
    delta = tokens - anchor
    squared = torch.diagonal(delta @ inverse @ delta.T).clamp(min=1e-8)
    return squared.sqrt().mean()


def torch_steps(models, start, given, trainable, pictures, draws):
    """Returns losses of STEPS published training steps and the pseudo tokens after them."""
    text, vocab = models.text, models.text.config.vocab_size
    text.resize_token_embeddings(vocab + len(start), mean_resizing=False)
    table = text.get_input_embeddings().weight
    table.data[vocab:] = torch.tensor(np.asarray(start))
    table.requires_grad_(True)
    before = table.detach().clone()
    enhancer, adapter = TorchEnhancer(), TorchAdapter()
    copy_parameters(enhancer, given["enhancer"])
    copy_parameters(adapter, trainable["adapter"])
    anchor = torch.tensor(np.asarray(start))
    face = torch.tensor(np.asarray(given["id_embed"]))[None]
    optimizer = torch.optim.AdamW(
        [table, *adapter.parameters()], lr=LR, betas=(0.9, 0.999), eps=1e-7, weight_decay=1e-2
    )
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = torch.cumprod(1 - betas, 0).float()
    scale = models.vae.config.scaling_factor
    losses = []
    for draw in draws:
        chosen = torch.stack(
            [pictures[i].flip(-1) if flip else pictures[i] for i, flip in draw["pictures"]]
        )
        posterior = models.vae.encode(chosen).latent_dist
        latents = (posterior.mean + posterior.std * draw["posterior"]) * scale
        alpha = signal[draw["timesteps"]].sqrt()[:, None, None, None]
        sigma = (1 - signal[draw["timesteps"]]).sqrt()[:, None, None, None]
        noisy = alpha * latents + sigma * draw["noise"]
        y = text(draw["token_ids"]).last_hidden_state
        y = adapter(y, enhancer(face, anchor))
        prediction = models.unet(noisy, draw["timesteps"], y).sample
        error = nn.functional.mse_loss(prediction, draw["noise"])
        loss = error + REG_WEIGHT * torch_regulariser(table[vocab:], anchor)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            table[:vocab] = before[:vocab]
        losses.append(loss.item())
    return losses, table[vocab:].detach().numpy()


@pytest.mark.parametrize("spread", [1.0, 0.02], ids=["ridge is cut off", "ridge survives"])
def test_official_profile_reproduces_the_published_steps(tmp_path, spread):
    models = reference.write_checkpoint(tmp_path, "sd2")
    model, frozen = sd.load(tmp_path)
    method = condition.make_method("official", reg_weight=REG_WEIGHT)
    rng = np.random.default_rng(0)
    key = jax.random.key(3)
    # Two anchor rows far apart or close together: float32's pseudo-inverse drops the ridge of the
    # covariance in the first case and keeps it in the second.
    start = rng.normal(size=(1, D)) + spread * 4 * rng.normal(size=(2, D))
    start = jnp.asarray(start, jnp.float32)
    face = rng.normal(size=512)
    given = condition.init_given(model, method, key, start, face / np.linalg.norm(face))
    assert (float(given["metric"]["ridge"]) == 0) == (spread == 1.0)
    trainable = condition.init_trainable(model, method, key, start)
    pictures = rng.uniform(-1, 1, size=(2, 32, 32, 3)).astype(np.float32)
    pairs = np.stack([pictures, pictures[:, :, ::-1]], axis=1).reshape(4, 32, 32, 3)
    mean, logvar = sd.encode_image(model, frozen, pairs)
    vocab = model.text.vocab_size
    token_ids = rng.integers(0, vocab, size=(6, 77)).astype(np.int32)
    token_ids[:, 8:10] = [vocab, vocab + 1]
    photos = Photos(
        mean.reshape(2, 2, *mean.shape[1:]),
        logvar.reshape(2, 2, *mean.shape[1:]),
        jnp.int32(2),
        jnp.asarray(token_ids),
    )
    optimizer = make_optimizer(
        {part: LR for part in method.parts()},
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-7,
        weight_decay=1e-2,
    )
    state = init_state(optimizer, trainable, given)
    step_fn = jax.jit(functools.partial(train_step, model, method, optimizer))

    def nchw(x):
        return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2).copy())

    draws, losses = [], []
    for step in range(STEPS):
        batch = draw_batch(model, photos, key, jnp.int32(step), BATCH)

        def draw(name, step=step):
            return jax.random.fold_in(stream(key, name), step)

        picture = np.minimum(np.floor(jax.random.uniform(draw("picture"), (BATCH,)) * 2), 1)
        mirror = np.asarray(jax.random.bernoulli(draw("mirror"), 0.5, (BATCH,)))
        shape = batch.latents.shape
        draws.append(
            {
                "pictures": list(zip(picture.astype(int), mirror, strict=True)),
                "posterior": nchw(jax.random.normal(draw("posterior"), shape)),
                "noise": nchw(batch.noise),
                "timesteps": torch.tensor(np.asarray(batch.timesteps)).long(),
                "token_ids": torch.tensor(np.asarray(batch.token_ids)).long(),
            }
        )
        state, metrics = step_fn(frozen, state, batch)
        losses.append(float(metrics.loss))

    expected, tokens = torch_steps(models, start, given, trainable, nchw(pictures), draws)
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-4)
    got = np.asarray(state.trainable["pseudo_tokens"])
    assert np.abs(got - np.asarray(start)).max() > 0.005  # the tokens did move
    np.testing.assert_allclose(got, tokens, rtol=0, atol=1e-4)
