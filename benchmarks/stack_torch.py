"""PyTorch with diffusers, as the stacks that this project is compared with.

    python -m benchmarks.stack_torch FOLDER DEVICE published|eager|compiled MODE

published (S): the training step of the published code, made runnable and changed in nothing that
costs time: float32, the VAE encodes in every step, the picture is read and resized for every
sample, the whole token table is trained and then restored, keys and values get gradients that
nothing applies, a pseudo-inverse of the covariance is taken in every step. The profile `official`
of this project is the same arithmetic.

eager (E): the paper's method as a careful user of diffusers would write it. Cached moments, only
what is trained has gradients, two token rows, channels last, fused AdamW, no waiting for the
device; in bfloat16 on a GPU, with cuDNN's attention.

compiled (C): E with `torch.compile` in a mode of its.
"""

import contextlib
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch import nn
from torch.nn import functional

from benchmarks import worker
from benchmarks.settings import (
    BETA,
    COMPARED_SAMPLING,
    COMPARED_STEPS,
    DECODED,
    EPSILON,
    GUIDANCE,
    RANK,
    RATE,
    REG_WEIGHT,
    WEIGHT_DECAY,
    read,
)
from idea_jax.data import images

# What a stack is asked for; "published" draws no pictures.
CALLS = "train_outputs sample_outputs train_time sample_time ceiling memory release".split()


class TorchEnhancer(nn.Module):
    """ID-Enhancer (METHOD: face and anchor to the identity-enhanced embedding)."""

    def __init__(self, width: int):
        super().__init__()
        self.expand = nn.Linear(512, width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, width)
        self.attention = nn.MultiheadAttention(width, 8, batch_first=True)
        self.out = nn.Linear(width, 2 * width)

    def forward(self, face: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        query = self.query(self.expand(face[None]).expand(len(anchor), -1))[None]
        keys = self.key_value(anchor)[None]
        return self.out(self.attention(query, keys, keys, need_weights=False)[0][0])


class Adapter(nn.Module):
    """ID-Adapter: gated self-attention over the text condition and the enhanced embedding."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(()))
        self.project = nn.Linear(2 * width, width)
        self.attention = nn.MultiheadAttention(width, 8, batch_first=True)

    def forward(self, text: torch.Tensor, enhanced: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([text, self.project(enhanced).expand(len(text), -1, -1)], dim=1)
        attended = self.attention(joined, joined, joined, need_weights=False)[0]
        return text + BETA * torch.tanh(self.gamma) * attended[:, : text.shape[1]]


class TokenTable(nn.Module):
    """The frozen table of input embeddings, with the pseudo tokens as ids beyond its end."""

    def __init__(self, table: nn.Embedding, pseudo_tokens: nn.Parameter):
        super().__init__()
        self.weight, self.pseudo_tokens = table.weight, pseudo_tokens

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        size = len(self.weight)
        plain = functional.embedding(ids.clamp(max=size - 1), self.weight)
        pseudo = functional.embedding((ids - size).clamp(min=0), self.pseudo_tokens)
        return torch.where((ids >= size)[..., None], pseudo.to(plain.dtype), plain)


class LowRank(nn.Module):
    """A frozen projection and its low-rank delta."""

    def __init__(self, linear: nn.Linear, down: torch.Tensor, up: torch.Tensor):
        super().__init__()
        self.linear = linear
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain = self.linear(x)
        return plain + ((x.float() @ self.down) @ self.up).to(plain.dtype)


class TorchStack:
    """Networks and inputs of one of the three; public methods answer one request each.

    Args:
      about: as `settings.read` returns it.
      inputs: called with the text encoder, returns the arrays of `workloads.write`. Parts of the
        person that it leaves out start at random, as in training.
      kind: "published", "eager" or "compiled".
      dtype: of the frozen networks.
      mode: of `torch.compile`, for "compiled".
    """

    def __init__(
        self,
        about: dict,
        inputs: Callable[..., dict],
        device: str,
        kind: str,
        dtype: torch.dtype,
        mode: str,
    ):
        self.about, self.device, self.kind, self.dtype = about, torch.device(device), kind, dtype
        self.mode = mode
        checkpoint = Path(about["checkpoint"])
        load = {"torch_dtype": dtype, "low_cpu_mem_usage": False}
        self.unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet", **load)
        self.vae = AutoencoderKL.from_pretrained(checkpoint / "vae", **load)
        self.text = transformers.CLIPTextModel.from_pretrained(
            checkpoint / "text_encoder", dtype=dtype
        )
        self.scheduler = DDIMScheduler.from_pretrained(checkpoint / "scheduler")
        for network in (self.unet, self.vae, self.text):
            network.to(self.device).eval().requires_grad_(False)
        self.signal = self.scheduler.alphas_cumprod.to(self.device)
        self.inputs = inputs(self.text)
        self.token_ids = self.tensor("token_ids").long()
        self.person()

    def tensor(self, name: str) -> torch.Tensor:
        return torch.tensor(self.inputs[name], device=self.device)

    # What is compared

    def train_outputs(self, profile: str) -> str:
        """Losses and pseudo tokens of a few steps on given draws, as a file."""
        losses = []
        for index in range(COMPARED_STEPS):
            draws = {
                name.removeprefix("draws/"): torch.tensor(value[index], device=self.device)
                for name, value in self.inputs.items()
                if name.startswith("draws/")
            }
            # As `drawn` gives them: a compiled step is compiled anew for another type.
            draws |= {name: x.long() for name, x in draws.items() if not x.is_floating_point()}
            losses.append(self.step(draws).item())
        return self.save(f"{self.kind}-{profile}", losses=losses, tokens=self.pseudo_tokens())

    def sample_outputs(self) -> str:
        """Pictures of a few steps of the person before any training, as a file."""
        for parameter, start in self.start:
            parameter.data.copy_(start)
        return self.save(f"{self.kind}-pictures", pictures=self.pictures(*COMPARED_SAMPLING))

    # What is timed

    def train_time(self, profile: str, batch: int, steps: int) -> float:
        """Seconds of a block of training steps; what they draw is drawn on the device.

        On a GPU after one more step: it asks for the memory that `release` has given back.
        """
        if self.device.type == "cuda":
            self.step(self.drawn(batch))
            self.wait()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        for _ in range(steps):
            self.step(self.drawn(batch))
        self.wait()
        return time.perf_counter() - started

    def sample_time(self, pictures: int, steps: int) -> float:
        """Seconds from the prompt's tokens to pictures on the host.

        On a GPU after a drawing of few steps, as in `train_time`.
        """
        if self.device.type == "cuda":
            self.pictures(pictures, COMPARED_SAMPLING[1])
        started = time.perf_counter()
        self.pictures(pictures, steps)
        return time.perf_counter() - started

    def ceiling(self, size: int) -> float:
        """FLOP/s of one square product in the compute dtype, the best of ten."""
        a = torch.randn(size, size, device=self.device).to(self.dtype)
        a @ a
        times = []
        for _ in range(10):
            self.wait()
            started = time.perf_counter()
            a @ a
            self.wait()
            times.append(time.perf_counter() - started)
        return 2 * size**3 / min(times)

    def memory(self) -> int:
        """Peak bytes: of a device since the last training began, on a CPU of the process so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def release(self) -> None:
        """Gives cached device memory back, for the next stack."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # Parts

    def pictures(self, count: int, steps: int) -> np.ndarray:
        """Pictures of the prompt, uint8[N, H, W, 3].

        Raises: ImageError if a value is not finite.
        """
        return images.to_uint8(self.draw(count, steps).float().cpu().numpy())

    def drawn(self, batch: int) -> dict[str, torch.Tensor]:
        """A step's random numbers, drawn on the device."""
        on = {"device": self.device}
        shape = (batch, *self.inputs["draws/noise"].shape[2:])
        return {
            "mirror": torch.randint(2, (batch,), **on),
            "posterior": torch.randn(shape, **on),
            "noise": torch.randn(shape, **on),
            "timesteps": torch.randint(len(self.signal), (batch,), **on),
            "rows": torch.randint(len(self.token_ids), (batch,), **on),
        }

    def pixels(self, mirror: bool) -> torch.Tensor:
        """The photo as the published data set gives it: read, resized, scaled; [3, H, W]."""
        side = self.about["pixels"]
        image = Image.open(self.about["photo"]).convert("RGB")
        image = image.resize((side, side), resample=Image.Resampling.BICUBIC)
        if mirror:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        values = (np.asarray(image).astype(np.uint8) / 127.5 - 1.0).astype(np.float32)
        return torch.from_numpy(values).permute(2, 0, 1)

    def noisy(self, latents: torch.Tensor, draws: dict) -> torch.Tensor:
        signal = self.signal[draws["timesteps"]][:, None, None, None]
        return signal.sqrt() * latents + (1 - signal).sqrt() * draws["noise"].permute(0, 3, 1, 2)

    def copy(self, module: nn.Module, prefix: str) -> None:
        """Fills the enhancer or the adapter from the inputs, if they hold it."""
        state = {}
        for path, value in self.inputs.items():
            if path.startswith(f"{prefix}/"):
                name = path[len(prefix) + 1 :].replace("/", ".").replace("kernel", "weight")
                name = name.replace("attention.to_out", "attention.out_proj")
                state[name] = torch.tensor(value.T if path.endswith("kernel") else value)
        module.to(self.device)
        if not state:
            return
        for kind in ("weight", "bias"):
            packed = [state.pop(f"attention.to_{name}.{kind}") for name in "qkv"]
            state[f"attention.in_proj_{kind}"] = torch.cat(packed)
        module.load_state_dict(state)

    def save(self, name: str, **arrays) -> str:
        path = Path(self.about["folder"]) / f"{name}.npz"
        np.savez(path, **arrays)
        return str(path)


class Published(TorchStack):
    """S: see the module's docstring."""

    def person(self) -> None:
        start = self.tensor("official/trainable/pseudo_tokens")
        self.anchor = self.tensor("official/given/anchor")
        self.face = self.tensor("official/given/id_embed")
        width = start.shape[1]
        self.enhancer, self.adapter = TorchEnhancer(width), Adapter(width)
        self.copy(self.enhancer, "official/given/enhancer")
        self.copy(self.adapter, "official/trainable/adapter")
        self.first = self.text.config.vocab_size
        self.text.resize_token_embeddings(self.first + len(start), mean_resizing=False)
        self.table = self.text.get_input_embeddings().weight.requires_grad_(True)
        self.table.data[self.first :] = start
        self.before = self.table.detach().clone()
        for name, parameter in self.unet.named_parameters():
            if re.search(r"attn2\.to_[kv]\.", name):
                parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            [self.table, *self.adapter.parameters()],
            lr=RATE,
            eps=EPSILON,
            weight_decay=WEIGHT_DECAY,
        )

    def step(self, draws: dict) -> torch.Tensor:
        pictures = torch.stack([self.pixels(bool(m)) for m in draws["mirror"].tolist()])
        posterior = self.vae.encode(pictures.to(self.device)).latent_dist
        latents = posterior.mean + posterior.std * draws["posterior"].permute(0, 3, 1, 2)
        latents = latents * self.vae.config.scaling_factor
        text = self.text(self.token_ids[draws["rows"]])[0]
        text = self.adapter(text, self.enhancer(self.face, self.anchor))
        prediction = self.unet(self.noisy(latents, draws), draws["timesteps"], text).sample
        error = functional.mse_loss(prediction, draws["noise"].permute(0, 3, 1, 2))
        loss = error + REG_WEIGHT * self.pull()
        loss.backward(retain_graph=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.table[: self.first] = self.before[: self.first]
        loss.detach().item()
        return loss.detach()

    def pull(self) -> torch.Tensor:
        """Mean Mahalanobis distance, its metric computed anew in every step."""
        width = self.anchor.shape[1]
        covariance = torch.cov(self.anchor.T) + 2e-5 * torch.eye(width, device=self.device)
        inverse = torch.linalg.pinv(covariance)
        delta = self.table[self.first :] - self.anchor
        return torch.diagonal(delta @ inverse @ delta.T).clamp(min=1e-8).sqrt().mean()

    def pseudo_tokens(self) -> np.ndarray:
        return self.table[self.first :].detach().cpu().numpy()


def truncated_inverse(anchor: torch.Tensor) -> torch.Tensor:
    """float32[d, d] of the anchor's rows [n, d]: the regulariser's matrix, with the cut-off that
    torch has for float32."""
    width = anchor.shape[1]
    covariance = torch.cov(anchor.T.double()) + 2e-5 * torch.eye(width, device=anchor.device)
    rtol = width * torch.finfo(torch.float32).eps
    return torch.linalg.pinv(covariance, rtol=rtol, hermitian=True).float()


class Careful(TorchStack):
    """E and C: see the module's docstring."""

    def person(self) -> None:
        prefix = "paper/trainable"
        self.tokens = nn.Parameter(self.tensor(f"{prefix}/pseudo_tokens"))
        self.anchor, self.face = (
            self.tensor("paper/given/anchor"),
            self.tensor("paper/given/id_embed"),
        )
        width = self.tokens.shape[1]
        self.enhancer, self.adapter = TorchEnhancer(width), Adapter(width)
        self.copy(self.enhancer, f"{prefix}/enhancer")
        self.copy(self.adapter, f"{prefix}/adapter")
        table = TokenTable(self.text.embeddings.token_embedding, self.tokens)
        self.text.embeddings.token_embedding = table
        self.deltas = self.add_deltas(f"{prefix}/kv/")
        self.inverse = truncated_inverse(self.anchor)
        for network in (self.unet, self.vae):
            network.to(memory_format=torch.channels_last)
        # Both moments of the photo and of its mirror, once.
        pictures = torch.stack([self.pixels(False), self.pixels(True)]).to(self.device, self.dtype)
        with torch.no_grad():
            posterior = self.vae.encode(pictures).latent_dist
        scale = self.vae.config.scaling_factor
        self.mean, self.std = posterior.mean.float() * scale, posterior.std.float() * scale
        trained = [self.tokens, *self.enhancer.parameters(), *self.adapter.parameters()]
        trained += [p for delta in self.deltas for p in (delta.down, delta.up)]
        self.start = [(parameter, parameter.detach().clone()) for parameter in trained]
        self.optimizer = torch.optim.AdamW(
            trained, lr=RATE, eps=EPSILON, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.loss_function, self.predict, self.decode = self.loss, self.unet, self.vae.decode
        if self.kind == "compiled":
            options = {"mode": self.mode, "dynamic": False}
            self.loss_function = torch.compile(self.loss, **options)
            self.predict = torch.compile(self.unet, **options)
            self.decode = torch.compile(self.vae.decode, **options)

    def add_deltas(self, prefix: str) -> list[LowRank]:
        """Puts the low-rank delta of keys and values beside each frozen projection."""
        deltas = []
        for name, module in list(self.unet.named_modules()):
            if not name.endswith(".attn2"):
                continue
            place = re.sub(r"\.(\d+)", r"_\1", name.removesuffix(".attn2")).replace(".", "/")
            for kind in ("to_k", "to_v"):
                linear, path = getattr(module, kind), f"{prefix}{place}/{kind}"
                width, inner = linear.in_features, linear.out_features
                if f"{path}/down" in self.inputs:
                    down, up = self.tensor(f"{path}/down"), self.tensor(f"{path}/up")
                else:
                    down = torch.randn(width, RANK, device=self.device) / width**0.5
                    up = torch.zeros(RANK, inner, device=self.device)
                deltas.append(LowRank(linear, down, up))
                setattr(module, kind, deltas[-1])
        return deltas

    def condition(self, ids: torch.Tensor) -> torch.Tensor:
        """The text condition of prompts that name the person."""
        encoded = self.text(ids)[0].float()
        return self.adapter(encoded, self.enhancer(self.face, self.anchor)).to(self.dtype)

    def loss(self, draws: dict) -> torch.Tensor:
        posterior = draws["posterior"].permute(0, 3, 1, 2)
        latents = self.mean[draws["mirror"]] + self.std[draws["mirror"]] * posterior
        noisy = self.noisy(latents, draws).to(self.dtype, memory_format=torch.channels_last)
        text = self.condition(self.token_ids[draws["rows"]])
        prediction = self.unet(noisy, draws["timesteps"], text).sample
        error = functional.mse_loss(prediction.float(), draws["noise"].permute(0, 3, 1, 2))
        delta = self.tokens - self.anchor
        squared = torch.sum((delta @ self.inverse) * delta, dim=1).clamp(min=1e-8)
        return error + REG_WEIGHT * squared.sqrt().mean()

    def step(self, draws: dict) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with self.attention():
            loss = self.loss_function(draws)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def draw(self, pictures: int, steps: int) -> torch.Tensor:
        """Pictures [N, H, W, 3] of the prompt, by DDIM with guidance in one call per step."""
        prompt = self.condition(self.tensor("prompt_ids").long()[None])
        negative = self.text(self.tensor("negative_ids").long()[None])[0].to(self.dtype)
        text = torch.cat([negative.expand(pictures, -1, -1), prompt.expand(pictures, -1, -1)])
        x = self.tensor("initial_noise")[:pictures].permute(0, 3, 1, 2)
        self.scheduler.set_timesteps(steps, device=self.device)
        with self.attention():
            for timestep in self.scheduler.timesteps:
                torch.compiler.cudagraph_mark_step_begin()
                both = torch.cat([x, x]).to(self.dtype, memory_format=torch.channels_last)
                unguided, guided = self.predict(both, timestep, text).sample.float().chunk(2)
                noise = unguided + GUIDANCE * (guided - unguided)
                x = self.scheduler.step(noise, timestep, x).prev_sample
            latents = (x / self.vae.config.scaling_factor).to(self.dtype)
            decoded = [
                self.decode(part.contiguous(memory_format=torch.channels_last)).sample
                for part in latents.split(DECODED)
            ]
        return torch.cat(decoded).permute(0, 2, 3, 1)

    def attention(self) -> contextlib.AbstractContextManager:
        """cuDNN's attention where there is one: for training shapes it beats torch's default."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        backends = torch.nn.attention.SDPBackend
        order = [backends.CUDNN_ATTENTION, backends.FLASH_ATTENTION, backends.EFFICIENT_ATTENTION]
        return torch.nn.attention.sdpa_kernel([*order, backends.MATH], set_priority=True)

    def pseudo_tokens(self) -> np.ndarray:
        return self.tokens.detach().cpu().numpy()


def open_stack(
    about: dict, inputs: Callable[..., dict], device: str, kind: str, mode: str
) -> TorchStack:
    """Loads a stack; the published step runs in float32, the others in bfloat16 on a GPU."""
    on_gpu = device == "cuda"
    # What torch's own tuning guide asks for; the published code leaves it off.
    if kind != "published" and on_gpu:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    cls = Published if kind == "published" else Careful
    careful_dtype = torch.bfloat16 if on_gpu else torch.float32
    dtype = torch.float32 if kind == "published" else careful_dtype
    return cls(about, inputs, device, kind, dtype, mode)


def main() -> None:
    folder, device, kind, mode = Path(sys.argv[1]), *sys.argv[2:]
    inputs = dict(np.load(folder / "inputs.npz"))
    stack = open_stack(read(folder), lambda _: inputs, device, kind, mode)
    worker.serve({name: getattr(stack, name) for name in CALLS})


if __name__ == "__main__":
    main()
