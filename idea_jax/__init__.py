"""ID-EA in JAX: learn one person from a photo, draw them with Stable Diffusion."""

__version__ = "0.1.0"
