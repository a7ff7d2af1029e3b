"""`make demo`: the whole way from one picture to new ones, on any machine, without a download.

The model is the mini (`idea_jax/mini`), a Stable Diffusion of a drawn world; the picture shows
somebody of that world whom none of its networks has seen. Everything is real but the world.
"""

import argparse
import base64
import html
import io
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from idea_jax import launch
from idea_jax.runtime.files import check_writable, say

PERSON = 26  # of the people for testing; not one of those that the lab reports on
PHOTO = Path(__file__).resolve().parent / "mini" / "photo.png"
CONFIG = Path(__file__).resolve().parent / "configs" / "mini_paper.yaml"
MARGIN = 1.3  # around the face: what the mini learned from shows that much of a person
PROMPTS = (3, 4, 6, 9)  # of captions.PROMPTS
PICTURES = 4
PAGES = ("index.html", "overview.png")
MARK = ".idea_jax-demo"  # in a folder whose contents the next demo may replace
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
figure { display: inline-block; margin: 0 1.5rem 1.5rem 0; vertical-align: top }
figcaption { max-width: 34rem; font-size: .9rem; color: #555 }
img { image-rendering: auto; border-radius: 6px; display: block }
table { border-collapse: collapse } td, th { padding: .25rem .9rem .25rem 0; text-align: left }
th { border-bottom: 1px solid #ccc }
.number { text-align: right; font-variant-numeric: tabular-nums }
svg { border-left: 1px solid #ccc; border-bottom: 1px solid #ccc }
code { background: #f3f3f3; padding: .1rem .3rem; border-radius: 3px }
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="idea-demo", description="Learns one person from a picture, draws them."
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path("demo"), help="to write to (default: demo)"
    )
    folder = parser.parse_args(argv).folder

    def work() -> int:
        clear(folder)
        return demonstrate(folder)

    return launch.run(work)


def clear(folder: Path) -> None:
    """Removes what an earlier demo wrote to `folder`, and nothing else.

    Raises: OSError if something of those names is there that no demo wrote, or one cannot write.
    """
    written = [folder / name for name in ("photo", "identity", "pictures")]
    mark, photo = folder / MARK, folder / "photo" / "photo.png"
    # Demos of earlier versions left no mark, but the same picture.
    ours = mark.is_file() or (photo.is_file() and photo.read_bytes() == PHOTO.read_bytes())
    if not ours and (foreign := [str(path) for path in written if path.exists()]):
        raise FileExistsError(
            f"{' and '.join(foreign)} would be replaced and was not made by this demo: remove it, "
            "or name another folder"
        )
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    for path in written:
        shutil.rmtree(path, ignore_errors=True)
    for name in PAGES:  # if this demo fails, none that looks like its result
        (folder / name).unlink(missing_ok=True)


def demonstrate(folder: Path) -> int:
    """Writes everything below `folder`, which is cleared; returns the exit code."""
    import sample_jax
    import train_jax
    from idea_jax.data.images import save_png
    from idea_jax.mini import captions, measures

    started = time.monotonic()
    photos, out, drawn = (folder / name for name in ("photo", "identity", "pictures"))
    photos.mkdir(parents=True)
    shutil.copy(PHOTO, photos / "photo.png")
    prompts = [captions.PROMPTS[number] for number in PROMPTS]

    say("Learning the person in the picture ...")
    common = ["--pretrained_model_name_or_path", "mini"]
    face = ["--crop", "face", "--crop_margin", str(MARGIN)]
    paths = ["--train_data_dir", str(photos), "--output_dir", str(out)]
    code = train_jax.main(["--config", str(CONFIG), *common, *face, *paths])
    learned = time.monotonic()
    if code:
        return code
    say("Drawing them ...")
    identity = ["--identity", str(out / "identity.safetensors"), "--save_dir", str(drawn)]
    settings = ["--num_images_per_prompt", str(PICTURES)]
    settings += ["--guidance_scale", str(measures.GUIDANCE)]
    texts = [prompt.text for prompt in prompts]
    code = sample_jax.main([*common, *identity, *settings, "--prompt", *texts])
    if code:
        return code
    finished = time.monotonic()

    say("Comparing them with true drawings of the same person ...")
    folders = {
        json.loads(path.read_text("utf-8"))["prompt"]: path.parent
        for path in drawn.glob("*/run.json")
    }
    pictures = np.stack([read_pictures(folders[text]) for text in texts])
    scores = measure(pictures, prompts)
    seconds = {
        "learning, from the start of the program": learned - started,
        f"drawing {pictures.shape[0] * pictures.shape[1]} pictures": finished - learned,
        "comparing": time.monotonic() - finished,
        "all": time.monotonic() - started,
    }
    run = json.loads((out / "run.json").read_text("utf-8"))
    page = write_page(folder / PAGES[0], pictures, texts, scores, run, seconds)
    save_png(folder / PAGES[1], overview(pictures, texts), {"prompts": " | ".join(texts)})
    name, score = "learned from the picture", scores["learned from the picture"]
    say(
        f"\nDone in {seconds['all']:.0f} s: open {page}\n"
        f"  likeness of the pictures ({name}): {score[0]:.2f}; of another person: "
        f"{scores['another person'][0]:.2f}; of the person's true drawings: "
        f"{scores['true drawings'][0]:.2f}\n"
        f"  identity: {out / 'identity.safetensors'}\n"
        f"  pictures: {drawn} (one folder per prompt)\n"
        "The mini knows one small drawn world. README.md says how to use a real Stable Diffusion."
    )
    return 0


def draw_photo() -> np.ndarray:
    """Returns uint8[256, 256, 3], the file `PHOTO`: the person small, aside and turned."""
    import jax

    from idea_jax.data.images import to_uint8
    from idea_jax.mini import people, traits, world
    from idea_jax.pytrees import stream

    everybody = people.unnamed("test", PERSON + 1)
    who = jax.tree.map(lambda leaf: leaf[PERSON], everybody)
    scene = traits.make_scene(background="blue", shirt="yellow")
    key = stream(jax.random.key(PERSON), "photo of the demo")
    view = world.View(zoom=0.45, angle=np.radians(24), x=0.3, y=0.3)
    draw = jax.jit(world.draw, static_argnames="size")
    return to_uint8(np.asarray(draw(who, scene, key, size=256, view=view)))


def face_square(photo: np.ndarray) -> np.ndarray:
    """Returns uint8[64, 64, 3]: what is trained on of a photo, with `--crop face`."""
    from PIL import Image

    from idea_jax.data.images import crop_turned, to_pixels, to_uint8
    from idea_jax.faces import finding
    from idea_jax.faces.crops import training_square
    from idea_jax.mini import drawings
    from idea_jax.models import hub

    image = Image.fromarray(photo)
    finder = finding.open_finder(hub.resolve(hub.MINI).folder / "face" / "recogniser.onnx")
    points = finder.look_at(image, PHOTO.name).points
    square = crop_turned(image, *training_square(points, image.size, MARGIN))
    return to_uint8(to_pixels(square, drawings.SIZE, center_crop=False))


def read_pictures(folder: Path) -> np.ndarray:
    """Returns the pictures of one prompt: uint8[N, H, W, 3]."""
    from idea_jax.data.images import read_image

    paths = sorted(path for path in folder.glob("*.png") if path.stem.isdigit())
    return np.stack([np.asarray(read_image(path)) for path in paths])


def measure(pictures: np.ndarray, prompts: Sequence) -> dict[str, tuple[float, float]]:
    """Returns (likeness, share of what was asked for) of the pictures and of two bounds."""
    from idea_jax.mini import measures, trials

    mini = measures.load()
    person, other = trials.meet(mini, "test", [PERSON, PERSON + 1], PICTURES, prompts=prompts)
    scoring = mini.scoring()
    each = {
        "learned from the picture": pictures,
        "another person": other.true,
        "true drawings": person.true,
    }
    return {
        name: trials.judge_pictures(mini, scoring, person, them, prompts)
        for name, them in each.items()
    }


def overview(pictures: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Returns the photo and all pictures as one, uint8[H, W, 3]: two rows of two prompts."""
    from PIL import Image, ImageDraw, ImageFont

    side, photo_side, gap, line = 96, 192, 6, 24
    block = PICTURES * (side + gap)
    left = photo_side + 4 * gap
    size = (left + 2 * block + 3 * gap, 2 * (line + side + gap) + gap)
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    with Image.open(PHOTO) as photo:
        canvas.paste(photo.convert("RGB").resize((photo_side,) * 2), (gap, gap + line))
    pen.text((gap, gap), "the only picture", "#222", font)
    for number, (text, them) in enumerate(zip(texts, pictures, strict=True)):
        x = left + (number % 2) * (block + 2 * gap)
        y = gap + (number // 2) * (line + side + gap)
        pen.text((x, y), text, "#222", font)
        for i, pixels in enumerate(them):
            drawn = Image.fromarray(pixels).resize((side, side))
            canvas.paste(drawn, (x + i * (side + gap), y + line))
    return np.asarray(canvas)


def write_page(
    path: Path,
    pictures: np.ndarray,
    texts: Sequence[str],
    scores: dict[str, tuple[float, float]],
    run: dict,
    seconds: dict[str, float],
) -> Path:
    """Writes one HTML file that needs no other: photo, pictures, scores, loss, times."""
    from PIL import Image

    from idea_jax.data.images import encode_png, image_grid

    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=number>{likeness:.3f}</td>"
        f"<td class=number>{asked:.0%}</td></tr>"
        for name, (likeness, asked) in scores.items()
    )
    figures = "".join(
        f"<figure>{image_tag(encode_png(image_grid(list(them), len(them)), {}), 2)}"
        f"<figcaption>{html.escape(text)}</figcaption></figure>"
        for text, them in zip(texts, pictures, strict=True)
    )
    times = "".join(
        f"<tr><td>{html.escape(what)}</td><td class=number>{time_:.1f} s</td></tr>"
        for what, time_ in seconds.items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    square = io.BytesIO()
    with Image.open(PHOTO) as photo:
        Image.fromarray(face_square(np.asarray(photo.convert("RGB")))).save(square, "PNG")
    body = f"""<!doctype html><html lang=en><meta charset=utf-8><title>idea_jax demo</title>
<style>{_STYLE}</style>
<h1>One picture in, new pictures out</h1>
<p>The first picture is all that is known of this person. The second is what was learned from: the
face that a detector found on it. The others were drawn by the mini, a small Stable Diffusion of a
drawn world that comes with idea_jax. None of its networks has seen this person before.</p>
<figure>{image_tag(PHOTO.read_bytes(), 1)}<figcaption>the picture</figcaption></figure>
<figure>{image_tag(square.getvalue(), 4)}<figcaption>the face, upright</figcaption></figure>
<div>{figures}</div>
<h2>How good are they?</h2>
<table><tr><th><th class=number>likeness<th class=number>prompt kept</tr>{rows}</table>
<p>Likeness is the mean cosine between the embeddings of the pictures and those of eight other true
drawings of the person, by a face recogniser that took no part in learning. A classifier reads what
the prompt asked for. The bounds are true drawings, made as the prompts ask, of somebody else and of
the person.</p>
<h2>Loss</h2>
{curve(run["loss_curve"])}
<p>{run["steps"]} steps; each point is the mean over a part of them.</p>
<h2>What ran</h2>
<table>{times}</table>
<p><code>train_jax.py --config configs/{CONFIG.name} --crop face
--crop_margin {MARGIN}</code>, then <code>sample_jax.py</code>, on
{html.escape(run["device"])}; {html.escape(versions)}.</p>
<p>All faces here are made up by a program; the pictures above are AI-generated.</p>
</html>
"""
    path.write_text(body, encoding="utf-8")
    return path


def image_tag(png: bytes, zoom: int) -> str:
    """Returns an <img> that carries a picture in itself, shown `zoom` times as large."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        width, height = (side * zoom for side in image.size)
    data = base64.b64encode(png).decode()
    return f'<img width={width} height={height} alt="" src="data:image/png;base64,{data}">'


def curve(points: Sequence[Sequence[float]], width: int = 640, height: int = 180) -> str:
    """Returns a line through (step, loss) as SVG, from a loss of zero upwards."""
    steps, losses = np.array(points, float).reshape(-1, 2).T
    top = max(losses.max() * 1.05, 1e-9)
    x = width * steps / max(steps.max(), 1)
    y = height * (1 - losses / top)
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return (
        f'<svg width={width} height={height} viewBox="0 0 {width} {height}">'
        f'<polyline fill=none stroke="#3366bb" stroke-width=2 points="{line}"/>'
        f'<text x=6 y=14 font-size=12 fill="#555">{top:.3f}</text></svg>'
    )


if __name__ == "__main__":
    sys.exit(main())
