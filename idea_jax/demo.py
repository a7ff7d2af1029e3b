"""`make demo`: the whole way from a photo to pictures, on any machine, without a download.

The checkpoint has random weights, so the pictures show that everything runs, not what the method
can do. The photo is scikit-image's portrait of the astronaut Eileen Collins (NASA, public domain).
"""

import shutil
import sys
import time
from pathlib import Path

PROMPTS = ("a photo of {} on the beach", "an oil painting of {} wearing a red hat")


def main(folder: Path = Path("demo")) -> int:
    """Writes everything below `folder`, replacing an earlier demo; returns the exit code."""
    from PIL import Image
    from skimage import data

    import sample_jax
    import train_jax
    from idea_jax import random_face, random_sd

    started = time.monotonic()
    model, photos, out, pictures = (
        folder / name for name in ("random-weights", "photo", "identity", "pictures")
    )
    for path in (model, photos, out, pictures):
        shutil.rmtree(path, ignore_errors=True)
    print(f"Writing a small Stable Diffusion checkpoint with RANDOM weights to {model} ...")
    random_sd.write(model, size="demo")
    random_face.write_random_recogniser(model / "face" / "arcface.onnx")
    photos.mkdir(parents=True)
    Image.fromarray(data.astronaut()).save(photos / "astronaut.png")

    print("Learning the person in the photo ...")
    config = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
    common = ["--pretrained_model_name_or_path", str(model)]
    paths = ["--train_data_dir", str(photos), "--output_dir", str(out)]
    code = train_jax.main(["--config", str(config), *common, *paths])
    if code == 0:
        print("Drawing them ...")
        identity = ["--identity", str(out / "identity.safetensors"), "--save_dir", str(pictures)]
        quick = ["--num_inference_steps", "20", "--scheduler", "dpmpp_2m"]
        code = sample_jax.main([*common, *identity, *quick, "--prompt", *PROMPTS])
    if code == 0:
        print(
            f"\nDone in {time.monotonic() - started:.0f} s.\n"
            f"  photo:    {photos / 'astronaut.png'}\n"
            f"  identity: {out / 'identity.safetensors'}\n"
            f"  pictures: {pictures} (one folder per prompt, each with grid.png)\n"
            "The weights of this checkpoint are RANDOM: the pictures show noise, and only prove\n"
            "that every part runs. README.md says how to use a real Stable Diffusion checkpoint."
        )
    return code


if __name__ == "__main__":
    sys.exit(main())
