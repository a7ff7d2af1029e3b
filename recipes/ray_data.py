"""Draws rows on all GPUs of a Ray cluster, with Ray Data.

    pip install 'ray[data]' '.[parquet]'    # in the folder of this project
    python recipes/ray_data.py ROWS.jsonl OUT MODEL PEOPLE [--actors 8] [--gpus 1]

Rows, people and columns are those of `idea-batch`. Each actor reads the model once. OUT receives
Parquet files: the columns of the rows and "picture", a PNG that is marked as AI-generated, or
"error", why there is none. `idea-batch --distributed` does the same without Ray, and goes on after
a break; this is for rows that are one stage of a longer pipeline.
"""

import argparse
import json
import os

import pyarrow as pa


class Painter:
    """An actor: a model on its device, which draws tables of rows."""

    def __init__(self, model: str, people: str, settings: dict | None = None):
        """
        Args:
          settings: more of `idea-batch`, such as {"mixed_precision": "bf16"}.
        """
        from idea_jax.config.reading import build
        from idea_jax.data.tokenizer import load_tokenizer
        from idea_jax.models import sd
        from idea_jax.sampling import engine
        from idea_jax.sampling.plan import open_model
        from idea_jax.sampling.rows import Roster
        from idea_jax.sampling.settings import BatchConfig

        needed = {"pretrained_model_name_or_path": model, "identities": people}
        unread = {"out": ".", "jobs": "rows.jsonl"}
        self.cfg = build(BatchConfig, {}, {**needed, **unread, **(settings or {})})
        found, self.model, loading = open_model(self.cfg)
        lengths = self.model.text.vocab_size, self.model.text.max_position_embeddings
        texts = engine.Texts(load_tokenizer(found.tokenizer, *lengths, found.padding))
        self.people = Roster(self.model, people, None), texts
        _, frozen = sd.load(found.folder, **loading)
        self.engine = engine.Engine(self.model, frozen, texts, each=self.cfg.batch_size)

    def __call__(self, table: pa.Table) -> pa.Table:
        """The rows with their pictures, or with why there is none."""
        from idea_jax.data import images
        from idea_jax.errors import InputError
        from idea_jax.sampling.rows import checked, make_job, sampling_of

        rows = [{**row, "picture": None, "error": None} for row in table.to_pylist()]
        jobs = {}
        for place, row in enumerate(rows):
            try:
                asked = {key: value for key, value in row.items() if value is not None}
                values = checked(asked, self.cfg)
                sampling = sampling_of(values, self.cfg, self.model)
                jobs[place] = make_job(place, values, sampling, self.people, {})
            except (InputError, ValueError) as error:
                row["error"] = str(error)
        order = list(jobs)
        for number, picture in self.engine.draw([job.row for job in jobs.values()]):
            place = order[number]
            note = {"parameters": json.dumps(jobs[place].about)}
            try:
                drawn = images.to_uint8(picture)
                rows[place]["picture"] = images.encode_picture(drawn, "png", note)
            except images.ImageError as error:
                rows[place]["error"] = str(error)
        more = [pa.field("picture", pa.binary()), pa.field("error", pa.string())]
        return pa.Table.from_pylist(rows, pa.schema([*table.schema, *more]))


def main() -> None:
    # Unless it is told otherwise, Ray reports to its makers that it was used.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("rows", "out", "model", "people"):
        parser.add_argument(name)
    parser.add_argument("--actors", type=int, default=8)
    parser.add_argument("--gpus", type=float, default=1, help="of an actor; 0 to draw on CPUs")
    parser.add_argument("--mixed_precision", default="bf16", choices=("no", "bf16"))
    args = parser.parse_args()
    drawn = ray.data.read_json(args.rows, lines=True).map_batches(
        Painter,
        fn_constructor_args=(args.model, args.people, {"mixed_precision": args.mixed_precision}),
        batch_format="pyarrow",
        batch_size=64,
        num_gpus=args.gpus,
        compute=ray.data.ActorPoolStrategy(size=args.actors),
    )
    drawn.write_parquet(args.out)


if __name__ == "__main__":
    main()
